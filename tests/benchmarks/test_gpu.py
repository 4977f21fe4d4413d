"""What a GPU is measured with, on the CPU: small shapes, the same code."""

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_prepared_script_measures_all_it_promises_and_writes_it_down(tmp_path: Path) -> None:
    words = ["--shapes", "tiny", "--device", "cpu", "--steps", "1", "--repeats", "1"]
    done = subprocess.run(
        ["sh", str(ROOT / "benchmarks" / "gpu.sh"), *words],
        env={**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "cpu"
    tiny = found["tiny"]
    assert tiny["gradient_error"] < 1e-5
    assert tiny["split_over_unsplit_speed"] > 0
    assert list(tiny["branches"]) == ["1", "8", "32"]
    assert all(branch["batched_speed"] > 0 for branch in tiny["branches"].values())
