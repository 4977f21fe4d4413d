"""MLflow and Weights & Biases get each round's numbers, and one run for a run that goes on."""

import json
import os
import subprocess
import sys

import pytest

from fedsplit.report.trackers import open_tracker

# Their packages are extras, and take seconds to import.
pytestmark = pytest.mark.slow

CONFIG = {"seed": 3, "model": {"source": "tiny", "r": 2}, "fleet": {"members": []}}


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    return folder


def test_mlflow_has_one_run_with_all_rounds(run_folder, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    for rounds in ((0, 1), (2,)):  # the second time it goes on
        tracker = open_tracker("mlflow", run_folder, CONFIG)
        for number in rounds:
            tracker.log({"eval_loss": 4.0 - number, "bytes_up.device": 10}, number)
        tracker.close()
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "fedsplit"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "my-run"
    assert run.info.status == "FINISHED"
    assert run.data.params["model.source"] == "tiny"
    history = client.get_metric_history(run.info.run_id, "eval_loss")
    assert [(item.step, item.value) for item in history] == [(0, 4.0), (1, 3.0), (2, 2.0)]


def test_wandb_gets_them_without_a_network(run_folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = open_tracker("wandb", run_folder, CONFIG)
    for number in range(2):
        tracker.log({"eval_loss": 4.0 - number}, number)
    tracker.close()
    known = json.loads((run_folder / "tracker.json").read_text())["wandb"]
    again = open_tracker("wandb", run_folder, CONFIG)
    assert again._run.id == known
    again.close()
    assert list((run_folder / "wandb").glob("offline-run-*"))


def test_neither_is_imported_unless_asked_for():
    code = (
        "import sys, fedsplit.apps.server_app, fedsplit.report.trackers;"
        "sys.exit(bool({'mlflow', 'wandb'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
