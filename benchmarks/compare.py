"""Peers on this machine, in one run: a step's time and memory, and what a round of a fleet costs.

    python -m benchmarks.compare [--rounds 6] [--steps 3] [--devices 10] [--turns 100]

Two tables. The first is that of `benchmarks.step`: a step of GPT-2 small's shape by the plain PEFT
loop, split over two processes, with two devices, and by torch.distributed.pipelining. The second is
that of `benchmarks.scale`: a run of so many devices by fedsplit and by plain Flower FedAvg, which
trains the whole model on every device. Versions and the machine go into one line of JSON with them.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.scale import COMMANDS, watch, write_checkpoint, write_text
from benchmarks.step import measure

PACKAGES = ("torch", "transformers", "peft", "flwr", "grpcio")


def machine() -> dict[str, Any]:
    """Return what was measured on, and with which versions."""
    info = Path("/proc/cpuinfo").read_text()
    names = {line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line}
    return {
        "processor": ", ".join(sorted(names)) or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def fleets(devices: int, turns: int) -> dict[str, dict[str, float]]:
    """Return what a turn costs all processes together, the work itself included."""
    found = {}
    rounds = 1 + max(2, math.ceil(turns / devices))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_checkpoint(place / "model")
        write_text(place / "text.txt", devices)
        for contestant, command in COMMANDS.items():
            folder = place / contestant
            if contestant == "flower":  # a split run makes its own
                folder.mkdir()
            run = watch(command(place, folder, devices, rounds), folder, rounds, 1)
            found[contestant] = {
                "cpu_ms_per_turn": round(run.round_s / devices * 1e3, 2),
                "first_round_cpu_s": round(run.cpu_s[0], 2),
                "peak_mb": round(run.peak_mb),
            }
    return found


def main() -> int:
    """Print both tables, and all figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="steps in a burst")
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--turns", type=int, default=100)
    options = parser.parse_args()
    of_fleets = fleets(options.devices, options.turns)
    print(f"{options.devices} devices{'CPU ms/turn':>14}{'CPU s to round 1':>18}{'peak MB':>10}")
    for name, row in of_fleets.items():
        numbers = row["cpu_ms_per_turn"], row["first_round_cpu_s"], row["peak_mb"]
        print(f"{name:10}{numbers[0]:14}{numbers[1]:18}{numbers[2]:10}", flush=True)
    steps = measure(options.rounds, options.steps)
    print(steps.table())
    report = {
        "machine": machine(),
        "step_s": {name: round(value, 4) for name, value in steps.step_s.items()},
        "step_peak_mb": {name: [round(x) for x in peak] for name, peak in steps.peaks.items()},
        "fleets": of_fleets,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
