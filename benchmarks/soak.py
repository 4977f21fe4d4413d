"""What a long run leaves behind in its processes: memory, threads, descriptors, processes.

    python -m benchmarks.soak [--rounds 200] [--devices 8]

Starts `fedsplit run` with a small job and looks at all of its processes all the time. A slope is
Theil and Sen's, over the rounds after the first quarter, with its 95 % interval; a run leaks where
the interval lies above 0 and the slope above what is allowed.

JSON: `rounds`, `looks`, `lost` turns, `leaks`, and the slopes `memory_mb_per_round` ...
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from scipy.stats import theilslopes

from fedsplit.report import read_records

JOB = (
    "data.seq_len=32",
    "train.batch_size=2",
    "train.steps=1",
    "evaluate.every=50",
    "run.concurrency=2",
)
# What may grow with each round: records and metrics are kept, nothing else.
ALLOWED = {"memory_mb": 0.05, "threads": 0.01, "descriptors": 0.01, "processes": 0.001}
_LOOK_S = 0.25
_MB = 2**20


def anonymous_bytes(pid: int) -> int:
    """Return what a process has allocated and holds, shared with whom it was forked from or not.

    Pages that a fork shares become its own one after the other, whenever a reference is counted in
    them: what is private to a process grows for hours without a single allocation.
    """
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    raise psutil.NoSuchProcess(pid)


def look(root: psutil.Process) -> dict[str, float]:
    """Return what the run's processes hold together; all zero once it has ended."""
    total = dict.fromkeys(ALLOWED, 0.0)
    with suppress(psutil.NoSuchProcess):
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total["memory_mb"] += anonymous_bytes(process.pid) / _MB
                total["threads"] += process.num_threads()
                total["descriptors"] += process.num_fds()
                total["processes"] += 1
    return total


def rounds_done(folder: Path) -> int:
    """Return how many rounds the run has completed."""
    with suppress(ValueError, FileNotFoundError):
        return max((record.round for record in read_records(folder)), default=0)
    return 0


def watch(command: Sequence[str], folder: Path) -> tuple[int, list[tuple[int, dict[str, float]]]]:
    """Run `command` to its end; return its exit code, and what it held at each look by round."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen: list[tuple[int, dict[str, float]]] = []
    root = psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(_LOOK_S)
        held, done = look(root), rounds_done(folder)
        if done and held["processes"] > 1:
            seen.append((done, held))
    return process.returncode, seen


def slopes(seen: Sequence[tuple[int, dict[str, float]]]) -> dict[str, tuple[float, float, float]]:
    """Return the growth with each round, and its interval, of all that is looked at."""
    last = max(done for done, _ in seen)
    steady = [(done, held) for done, held in seen if done > last / 4]
    rounds = [done for done, _ in steady]
    found = {}
    for name in ALLOWED:
        slope, _, low, high = theilslopes([held[name] for _, held in steady], rounds)
        found[name] = float(slope), float(low), float(high)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code says whether nothing grows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--devices", type=int, default=8)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fedsplit-soak-") as place:
        folder = Path(place) / "run"
        job = (*JOB, f"rounds={options.rounds}", f"fleet.devices={options.devices}")
        command = [sys.executable, "-m", "fedsplit.apps", "run", *job, f"output={folder}"]
        code, seen = watch(command, folder)
        lost = sum(len(record.failures) for record in read_records(folder)) if not code else None
    if code or len(seen) < 20:
        print(json.dumps({"exit": code, "looks": len(seen)}))
        return 1
    found = slopes(seen)
    print(f"{'':12} {'at first':>10} {'at last':>10} {'a round':>10} {'95 % interval':>22}")
    for name, (slope, low, high) in found.items():
        ends = seen[0][1][name], seen[-1][1][name]
        print(f"{name:12} {ends[0]:10.1f} {ends[1]:10.1f} {slope:10.4f}   {low:9.4f} {high:9.4f}")
    leaks = [name for name, (slope, low, _) in found.items() if low > 0 and slope > ALLOWED[name]]
    report = {f"{name}_per_round": round(slope, 5) for name, (slope, _, _) in found.items()}
    print(
        json.dumps(
            {"rounds": options.rounds, "looks": len(seen), "lost": lost, "leaks": leaks, **report}
        )
    )
    return 1 if leaks or lost else 0


if __name__ == "__main__":
    sys.exit(main())
