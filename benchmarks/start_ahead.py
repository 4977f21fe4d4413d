"""A branch of devices one after the other: what it gains when the next one is started ahead.

    python -m benchmarks.start_ahead [--steps 60] [--repeats 3]

Every message is worked on by a fresh interpreter that imports everything and loads model and data,
as a SuperNode does it; four devices train one after the other (vanilla split learning, the default
job's model on real text, loopback TCP). Both ways in turn; medians. The adapters have to be the
same to the last bit, and the round has to be shorter.

JSON: `one_by_one_s`, `ahead_s` (a round), `saved_share`, `equal`.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from fedsplit.apps.launch.flower_tools import free_ports
from torch import Tensor

from benchmarks._faults import DEVICES, ProcessGrid
from fedsplit.assets import default_checkpoint
from fedsplit.data import DataSpec
from fedsplit.errors import FedsplitError
from fedsplit.execution import OptimizerSpec
from fedsplit.flower import Job, LinkSettings, StageHost
from fedsplit.flower.server.coordinator import Coordinator
from fedsplit.flower.server.roster import DeviceNode, Roster
from fedsplit.models import ModelSpec
from fedsplit.plan import Branch, Route, Turn

FLOOR_SAVED = 0.0


def write_texts(folder: Path) -> None:
    """Write a text for each device."""
    for index in range(DEVICES):
        words = "\n\n".join(f"Device {index} counts {n} and {n * n}." for n in range(400))
        (folder / f"{index}.txt").write_text(words)


def describe(folder: Path) -> Job:
    """Return what all turns share."""
    return Job(
        model=ModelSpec(source=str(default_checkpoint()), r=4),
        data=DataSpec(source="text", path=str(folder), seq_len=64, min_samples=4),
        optimizer=OptimizerSpec(name="adamw", lr=3e-3),
        n_devices=DEVICES,
        batch_size=4,
        seed=0,
        accelerator="cpu",
    )


def run_round(
    host: StageHost, job: Job, initial: Mapping[str, Tensor], steps: int, start_ahead: bool
) -> tuple[float, Mapping[str, Tensor]]:
    """Train one branch of all devices; return the seconds it took and its adapters."""
    roster = Roster(tuple(DeviceNode(index + 1, index, 8, 8) for index in range(DEVICES)))
    route = Route.two_tier(host.n_blocks, 1)
    branch = Branch(tuple(Turn(device, route, steps) for device in range(DEVICES)))
    grid = ProcessGrid([], [], None, cold=True)
    coordinator = Coordinator(grid, host, job=job, roster=roster, start_ahead=start_ahead)
    started = time.monotonic()
    try:
        (outcome,), failures = coordinator.train(1, [branch], initial)
    finally:
        grid.close()
    if failures:
        raise FedsplitError(f"a turn was lost: {failures}")
    return time.monotonic() - started, outcome.adapters


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code says whether a start ahead gains, and changes nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fedsplit-ahead-"))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    adapters = []
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        write_texts(folder)
        job = describe(folder)
        link = LinkSettings(bind=f"127.0.0.1:{free_ports(1)[0]}")
        host = stack.enter_context(StageHost(job, link))
        initial = host.initial_adapters()
        for _ in range(options.repeats):
            for start_ahead in (False, True):
                took_s, trained = run_round(host, job, initial, options.steps, start_ahead)
                seconds[start_ahead].append(took_s)
                adapters.append(trained)
                name = "started ahead" if start_ahead else "one by one"
                print(f"{name:14} {took_s:6.1f} s", flush=True)
    one_by_one_s, ahead_s = (statistics.median(seconds[way]) for way in (False, True))
    equal = all(
        torch.equal(tensor, adapters[0][name])
        for trained in adapters
        for name, tensor in trained.items()
    )
    saved = 1 - ahead_s / one_by_one_s
    report = {
        "one_by_one_s": round(one_by_one_s, 2),
        "ahead_s": round(ahead_s, 2),
        "saved_share": round(saved, 3),
        "equal": equal,
        "devices": DEVICES,
        "steps": options.steps,
    }
    print(json.dumps(report))
    return 0 if equal and saved > FLOOR_SAVED else 1


if __name__ == "__main__":
    sys.exit(main())
