"""``fedsplit run`` as a user types it: real Flower processes, files that other tools open."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


def fedsplit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "fedsplit.apps", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def job(tiny_checkpoint: Path, tiny_text: Path) -> list[str]:
    """Return the overrides of a job of three devices that takes seconds of training."""
    return [
        f"model={tiny_checkpoint}",
        "model.r=2",
        "data=text",
        f"data.path={tiny_text}",
        "data.seq_len=16",
        "data.min_samples=4",
        "fleet.devices=3",
        "data.partition=iid",
        "train.batch_size=2",
        "train.steps=2",
        "strategy.cut=1",
    ]


@pytest.fixture(scope="module")
def finished(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of two rounds, two devices at a time."""
    place = tmp_path_factory.mktemp("finished")
    result = fedsplit("run", *job, "rounds=2", "run.concurrency=2", "output=out", cwd=place)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "round 2/2" in result.stdout
    assert str(place / "out") in result.stdout.replace("\n", "")
    return place / "out"


def rounds(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "results.json").read_text())["rounds"])


def losses(folder: Path) -> list[tuple[float | None, float | None]]:
    return [(record["train_loss"], record["eval_loss"]) for record in rounds(folder)]


def test_a_run_leaves_files_that_other_tools_open(finished: Path) -> None:
    records = rounds(finished)
    assert [record["round"] for record in records] == [0, 1, 2]
    assert records[2]["participants"] == [0, 1, 2]
    assert records[2]["failures"] == []
    assert records[2]["bytes_up"]["device"] > 0
    assert records[2]["perplexity"] == pytest.approx(math.exp(records[2]["eval_loss"]))
    with (finished / "metrics.csv").open() as file:
        assert [row["round"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    assert (finished / "config.yaml").exists()
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").glob("events*"))


def test_the_adapter_gives_the_same_loss_in_a_plain_peft_script(
    finished: Path, tiny_checkpoint: Path, tiny_text: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedsplit.data import DataSpec, batches, load_data

    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model = PeftModel.from_pretrained(base, finished / "adapter").eval()
    spec = DataSpec(source="text", path=str(tiny_text), seq_len=16, min_samples=4, partition="iid")
    data = load_data(spec, AutoTokenizer.from_pretrained(tiny_checkpoint), 3, seed=0)
    total, targets = 0.0, 0
    with torch.no_grad():
        for device in range(3):
            for batch in batches(data.test(device), 2):
                count = int((batch.inputs["labels"][:, 1:] != -100).sum())
                total += float(model(**batch.inputs).loss) * count
                targets += count
    assert total / targets == pytest.approx(rounds(finished)[2]["eval_loss"], rel=1e-5)


def test_a_resumed_run_with_another_concurrency_ends_with_the_same_numbers(
    finished: Path, job: list[str], tmp_path: Path
) -> None:
    first = fedsplit("run", *job, "rounds=1", "run.concurrency=1", "output=out", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    second = fedsplit("run", "resume=out", "rounds=2", "run.concurrency=4", cwd=tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert losses(tmp_path / "out") == losses(finished)
    again = fedsplit("run", "resume=out", "rounds=2", cwd=tmp_path)
    assert again.returncode == 2
    assert "already done" in again.stderr


def test_a_failing_server_app_gives_its_cause_and_a_failing_exit(
    job: list[str], tmp_path: Path
) -> None:
    """With such a rate all losses are infinite after a step; the server app then gives up."""
    wild = ("train.optimizer.name=sgd", "train.optimizer.lr=1e30", "train.steps=3")
    result = fedsplit("run", *job, *wild, "rounds=1", "output=out", cwd=tmp_path)
    assert result.returncode == 1
    assert re.search(r"run failed: round 1: no device finished \(device \d: ", result.stdout)
    assert "Traceback" not in result.stdout
    assert (tmp_path / "out" / "flower.log").exists()


@pytest.mark.slow
def test_flowers_own_engine_ends_with_the_same_numbers(
    finished: Path, job: list[str], tmp_path: Path
) -> None:
    result = fedsplit(
        *("run", *job, "rounds=2", "run.concurrency=2", "run.engine=flower", "output=out"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path / "out") == losses(finished)
