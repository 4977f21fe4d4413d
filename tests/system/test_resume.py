"""A run that is told its settings bit by bit, and is killed, ends as the one told at once."""

import json
import re
import shlex
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.system.running import ROOT, start, tiny_job, wait_until

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1800)]

RATE = "train.optimizer.lr=3e-3"


def finish(overrides: list[str], cwd: Path) -> str:
    """Run to the end; return what was printed."""
    process = start(overrides, cwd)
    output, _ = process.communicate(timeout=900)
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
    wait_until(lambda: reached(cwd / "out") > before or process.poll() is not None, 900)
    if process.poll() is None:
        below = psutil.Process(process.pid).children(recursive=True)
        family = [child for child in below if ROOT in child.cmdline()]
        parents = {child.pid for child in family}
        servers = [child for child in family if child.ppid() in parents]
        min(servers, key=lambda child: (child.create_time(), child.pid)).kill()
    output, _ = process.communicate(timeout=300)
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
    job = [*tiny_job(tiny_checkpoint, tiny_text), "train.steps=4"]
    places = bit_by_bit, at_once = tmp_path / "bit_by_bit", tmp_path / "at_once"
    for place in places:
        place.mkdir()
        finish([*job, "output=out"], place)
    printed = strike(["resume=out", "rounds=998", RATE], bit_by_bit)
    printed = strike([*printed, "rounds=999"], bit_by_bit)
    rounds = reached(bit_by_bit / "out") + 1
    finish([*printed, f"rounds={rounds}"], bit_by_bit)
    finish(["resume=out", f"rounds={rounds}", RATE], at_once)

    (found, adapters), (expected, others) = (outcome(place / "out") for place in places)
    assert len(found) == rounds + 1
    assert found == expected
    assert adapters.keys() == others.keys()
    assert all(torch.equal(adapters[name], others[name]) for name in adapters)


def test_a_resumed_run_knows_who_is_late_who_left_and_whose_energy_is_spent(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    job = [
        *tiny_job(tiny_checkpoint, tiny_text), "fleet.devices=4", "run.quorum_devices=2",
        "run.late=carry", "fleet.dropout.probability=0.3", "fleet.dropout.away_s=0.01",
        "fleet.budget_j=[3e-4,1.2e-3]",
    ]  # fmt: skip
    finish([*job, "rounds=2", "output=bit_by_bit"], tmp_path)
    finish(["resume=bit_by_bit", "rounds=6"], tmp_path)
    finish([*job, "rounds=6", "output=at_once"], tmp_path)
    (found, adapters), (expected, others) = (
        outcome(tmp_path / name) for name in ("bit_by_bit", "at_once")
    )
    assert found == expected
    assert all(torch.equal(adapters[name], others[name]) for name in adapters)
    told = [
        [
            [record.get(key) for key in ("late", "arrived", "left", "exhausted")]
            for record in json.loads((tmp_path / name / "results.json").read_text())["rounds"]
        ]
        for name in ("bit_by_bit", "at_once")
    ]
    assert told[0] == told[1]
    assert all(any(record[key] for record in told[0]) for key in range(4)), told
