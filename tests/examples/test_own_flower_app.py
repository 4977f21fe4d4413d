"""The library in a Flower app of one's own: same losses as with data that the job names."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from fedsplit.strategies.splitfed import SplitFed
from flwr.app import Context
from flwr.serverapp.strategy import FedAvg

from fedsplit.flower import SplitStrategy, client_app
from fedsplit.flower.node.device import named_data
from fedsplit.testing.federation import N_DEVICES, Federation
from fedsplit.testing.grid import ThreadGrid
from tests.flower.conftest import federation

__all__ = ["federation"]

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_flower_app"


def test_each_side_is_small() -> None:
    for side in ("server_app.py", "client_app.py"):
        assert len((EXAMPLE / "own_flower_app" / side).read_text().splitlines()) <= 40


def test_a_loader_of_ones_own_gives_the_same_losses(federation: Federation) -> None:
    """Devices that load the same samples themselves train the same, to the last bit."""
    data = named_data(federation.job)

    def rows(context: Context) -> tuple[list[dict[str, torch.Tensor]], ...]:
        device = int(context.node_config["partition-id"])
        parts = []
        for samples in (data.train(device), data.test(device)):
            whole = samples.select(range(len(samples)))
            parts.append(
                [{name: tensor[i] for name, tensor in whole.items()} for i in range(len(samples))]
            )
        return tuple(parts)

    expected, outcomes = federation.run(SplitFed(cut=2), rounds=2)
    found, others = federation.run(SplitFed(cut=2), rounds=2, app=client_app(rows))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for one, other in zip(outcomes, others, strict=True):
        for mine, theirs in zip(one.turns, other.turns, strict=True):
            assert mine.loss_sum == theirs.loss_sum


def test_a_strategy_needs_no_more_than_a_job(federation: Federation) -> None:
    """Without a scene the default fleet and channel are planned for, a turn is an epoch."""
    inner = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
    job = replace(federation.job, source="")
    strategy = SplitStrategy(SplitFed(cut=2), inner, job=job)
    result = strategy.start(ThreadGrid(federation.app, N_DEVICES), num_rounds=1)
    losses = [metrics["loss"] for metrics in result.evaluate_metrics_clientapp.values()]
    assert losses[1] < losses[0]


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[Path]:
    """Return a home for Flower, whose SuperLink outlives `flwr run` and is ended here."""
    yield tmp_path
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(tmp_path) in word for word in process.cmdline()):
                process.kill()
                process.wait(10)


@pytest.mark.slow
@pytest.mark.system
def test_flwr_run_trains_it(flower_home: Path) -> None:
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "flwr"),
            "run",
            str(EXAMPLE),
            "--stream",
            "--federation-config",
            "num-supernodes=2 client-resources-num-cpus=1",
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(flower_home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    losses = [float(loss) for loss in re.findall(r"evaluation loss ([\d.]+)", done.stdout)]
    assert len(losses) == 3, done.stdout + done.stderr
    assert losses[2] < losses[0]


def test_the_example_imports() -> None:
    sys.path.insert(0, str(EXAMPLE))
    try:
        assert importlib.import_module("own_flower_app.client_app").app is not None
    finally:
        sys.path.remove(str(EXAMPLE))
