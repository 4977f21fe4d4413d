"""Every benchmark still runs: at its smallest size to the end, or where that is long, for a while.

At such sizes floors mean nothing, so missing one (exit code 1) is no failure; a traceback is.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(
    file.stem for file in (ROOT / "benchmarks").glob("*.py") if not file.stem.startswith("_")
)
A_WHILE_S = 60
"""What a benchmark that is not in `SMALL` runs, in wall seconds, before it is stopped."""
_JOB = "rounds=1 train.steps=1 train.batch_size=2 data.max_samples=96 data.seq_len=32"
SMALL: Mapping[str, str] = {
    "branches": "--repeats 1 --tokens 16 --branches 2",
    "centralised": f"{_JOB} fleet.devices=2",
    "codec": "--rounds 1",
    "compare": "--rounds 1 --steps 1 --devices 2 --turns 4",
    "conformance": "--only gpt2 --jobs 1",
    "faults": "--faults 1",
    "frozen": "--cuts 1 --epochs 1 --examples 24",
    "ranks": "--rounds 1 --steps 1",
    "scale": "--sizes 2 --turns 4 --contestants split",
    "soak": "--rounds 3 --devices 2",
    "start_ahead": "--steps 1 --repeats 1",
    "step": "--rounds 1 --steps 1",
    "studies": "",
}
ELSEWHERE: Mapping[str, str] = {
    "gpu": "tests/benchmarks/test_gpu.py runs it",
    "memory": "writes a checkpoint of a billion weights",
    "schemes": "needs the folder of a study; tests/docs/test_results.py reads what it wrote",
    "real": "needs the folder of a real model, with a chat template",
}


def test_what_is_said_of_benchmarks_is_of_some_that_there_are() -> None:
    assert SMALL.keys() | ELSEWHERE.keys() <= set(NAMES)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs(name: str, tmp_path: Path) -> None:
    if name in ELSEWHERE:
        pytest.skip(ELSEWHERE[name])
    if name == "trl":
        pytest.importorskip("trl")
    said = tmp_path / "said.txt"
    with said.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{name}", *SMALL.get(name, "").split()],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(800 if name in SMALL else A_WHILE_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = said.read_text()
    assert "Traceback" not in text, text[-3000:]
    assert code in ((0, 1) if name in SMALL else (0, 1, None)), text[-3000:]
