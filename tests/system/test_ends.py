"""However a run ends, nothing of it is left ten seconds later, and nothing else ends with it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.running import Running, tiny_job, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

GONE_S, INTERRUPTED_S = 10.0, 5.0


@pytest.fixture
def job(tiny_checkpoint: Path, tiny_text: Path) -> list[str]:
    return tiny_job(tiny_checkpoint, tiny_text)


@pytest.fixture
def bystander() -> Iterator["subprocess.Popen[bytes]"]:
    """Yield a process of this user that has nothing to do with the run."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("struck", "number", "status"),
    [
        ("command", signal.SIGINT, 130),
        ("server", signal.SIGKILL, 1),
        ("front", signal.SIGKILL, 1),
        pytest.param("command", signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("command", signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("root", signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param("root", signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param("server", signal.SIGTERM, 1, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_and_nothing_else_ends(
    job: list[str],
    tmp_path: Path,
    bystander: "subprocess.Popen[bytes]",
    struck: str,
    number: signal.Signals,
    status: int,
) -> None:
    run = Running(job, tmp_path)
    try:
        run.part(struck).send_signal(number)
        started = time.monotonic()
        output, _ = run.process.communicate(timeout=60)
        ended_s = time.monotonic() - started
        wait_until(lambda: not run.processes() and not run.home.exists(), GONE_S)
    finally:
        run.end()
    assert run.process.returncode == status, output
    assert ended_s < (INTERRUPTED_S if number == signal.SIGINT else GONE_S)
    assert bystander.poll() is None
    if struck != "command":
        how = f" ({number.name})" if struck == "server" else ""
        assert f"process ended without a word{how}\n" in output
    if struck in ("root", "server") or number == signal.SIGINT:
        assert "go on with: fedsplit run resume=" in output


def test_the_command_itself_imports_nothing_large(job: list[str], tmp_path: Path) -> None:
    """What takes seconds and hundreds of MB to import is there once, at the root."""
    run = Running(job, tmp_path)
    try:
        maps = {name: run.part(name).memory_maps() for name in ("command", "front")}
        loaded = {
            name: any("libtorch_cpu" in item.path for item in parts) for name, parts in maps.items()
        }
        assert loaded == {"command": False, "front": True}
        assert run.part("command").memory_full_info().uss < 100e6
    finally:
        run.end()


def test_a_killed_worker_costs_its_turn_and_a_second_start_is_refused(
    job: list[str], tmp_path: Path
) -> None:
    """Both in one run: starting one takes seconds."""
    run = Running([*job, "train.steps=20"], tmp_path)
    try:
        run.part("worker").kill()
        reached = run.rounds()
        wait_until(lambda: run.rounds() >= reached + 2)
        records = json.loads((run.output / "results.json").read_text())["rounds"]
        failures = [failure for record in records for failure in record["failures"]]
        assert len(failures) <= 1, "the one whose turn it was, if it had one"
        assert records[-1]["failures"] == []

        for command in ([*job, "output=out"], ["resume=out"]):
            second = subprocess.run(
                [sys.executable, "-m", "fedsplit.apps", "run", *command],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert second.returncode == 2, second.stdout + second.stderr
            assert f"is running (pid {run.part('front').pid})" in second.stderr.replace("\n", "")
        assert run.process.poll() is None
    finally:
        run.end()
        wait_until(lambda: not run.processes(), GONE_S)
