"""A scheme's author needs neither torch nor Flower, and waits for neither."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "peft", "grpc", "ray", "flwr", "matplotlib")
SCHEMES = sorted(file.stem for file in (ROOT / "strategies").glob("[a-z]*.py"))
MODULES = [
    "fedsplit.schemes",
    "fedsplit.planning",
    "fedsplit.testing.scenes",
    *(f"fedsplit.strategies.{name}" for name in SCHEMES),
]
LIMIT_S = 1.2


@pytest.mark.parametrize("module", MODULES)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    program = (
        f"import sys, time; import {module}; "
        f"print(*[name for name in {HEAVY} if name in sys.modules], time.process_time())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *loaded, seconds = done.stdout.split()
    assert not loaded
    assert float(seconds) < 2 * LIMIT_S, "twice the aim, for a machine that does other things too"
