"""What a study costs beyond its runs: ``python -m benchmarks.studies``, a table and a JSON object.

The same four runs, as one study and as commands of their own, in processor seconds of all their
processes: wall seconds depend on what else the machine does. A study that is complete is started
once more, to see what finding that out costs.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

LIMIT = 0.03
JOB = ["rounds=2", "train.steps=2", "train.batch_size=4", "data.max_samples=96", "data.seq_len=32"]
SCHEMES, SEEDS = ("splitfed", "sft"), (0, 1)


def main() -> int:
    """Print the figures; return 1 if a study costs more than its runs by `LIMIT`."""
    sweep = [f"strategy={','.join(SCHEMES)}", f"seed={','.join(map(str, SEEDS))}"]
    with tempfile.TemporaryDirectory(prefix="studies-") as folder:
        place = Path(folder)
        alone = [
            ["run", *JOB, f"strategy={name}", f"seed={n}"] for name, n in product(SCHEMES, SEEDS)
        ]
        _used_s([*alone[0], f"output={place / 'first'}"])  # what is kept of a model is there now
        study = ["run", "-m", *JOB, *sweep, f"output={place / 'study'}"]
        study_s = _used_s(study)
        again_s = _used_s(study)
        alone_s = sum(_used_s([*one, f"output={place / str(n)}"]) for n, one in enumerate(alone))
    found = {
        "runs": len(alone),
        "study_cpu_s": round(study_s, 2),
        "alone_cpu_s": round(alone_s, 2),
        "overhead": round(study_s / alone_s - 1, 4),
        "limit": LIMIT,
        "complete_study_cpu_s": round(again_s, 2),
    }
    table = Table(
        "processor seconds", "study", "runs alone", "overhead", "allowed", "once complete"
    )
    table.add_row(
        f"of {len(alone)} runs",
        f"{study_s:.1f}",
        f"{alone_s:.1f}",
        f"{100 * found['overhead']:.1f} %",
        f"{100 * LIMIT:.0f} %",
        f"{again_s:.1f}",
    )
    Console(stderr=True).print(table)
    print(json.dumps(found, indent=1))
    return int(found["overhead"] > LIMIT)


def _used_s(arguments: list[str]) -> float:
    """Return the processor seconds of a command and all that it starts and waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "fedsplit.apps", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
