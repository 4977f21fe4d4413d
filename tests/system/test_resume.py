"""A run that is told its settings bit by bit, and is killed, ends as the one told at once."""

import json
import re
import shlex
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from fedsplit.apps.launch.surroundings import MARK
from safetensors.torch import load_file

from tests.system.running import ROOT, start, tiny_job, wait_until

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(900)]

RATE = "train.optimizer.lr=3e-3"


def finish(overrides: list[str], cwd: Path) -> str:
    """Run to the end; return what was printed."""
    process = start(overrides, cwd)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def reached(folder: Path) -> int:
    with suppress(OSError, ValueError):
        return int(json.loads((folder / "checkpoint" / "state.json").read_text())["server_round"])
    return 0


def strike(overrides: list[str], cwd: Path) -> list[str]:
    """Kill the server once it has done a round; return the command that is printed then."""
    before = reached(cwd / "out")
    process = start(overrides, cwd)
    wait_until(lambda: reached(cwd / "out") > before or process.poll() is not None)
    below = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if ROOT in child.cmdline() and MARK in child.environ()
    ]
    root = min(below, key=lambda child: child.pid)
    min(root.children(), key=lambda child: child.create_time()).kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    found = re.search(r"go on with: (fedsplit run .*)", output)
    assert found is not None, output
    return shlex.split(found[1])[2:]


def outcome(folder: Path) -> tuple[list[tuple[float | None, ...]], dict[str, torch.Tensor]]:
    records = json.loads((folder / "results.json").read_text())["rounds"]
    losses = [(record["train_loss"], record["eval_loss"]) for record in records]
    return losses, load_file(folder / "adapter" / "adapter_model.safetensors")


def test_resumed_twice_with_other_rounds_and_rate_and_killed_in_between(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    job = [*tiny_job(tiny_checkpoint, tiny_text), "train.steps=40"]
    for place in ("at_once", "bit_by_bit"):
        (tmp_path / place).mkdir()
        finish([*job, "output=out"], tmp_path / place)
    finish(["resume=out", "rounds=6", RATE], tmp_path / "at_once")

    place = tmp_path / "bit_by_bit"
    printed = strike(["resume=out", "rounds=4", RATE], place)
    printed = strike([*printed, "rounds=6"], place)
    finish(printed, place)

    (found, adapters), (expected, others) = (
        outcome(tmp_path / name / "out") for name in ("bit_by_bit", "at_once")
    )
    assert len(found) == 7
    assert found == expected
    assert adapters.keys() == others.keys()
    assert all(torch.equal(adapters[name], others[name]) for name in adapters)
