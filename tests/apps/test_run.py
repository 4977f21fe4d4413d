"""The same command goes on with a run that was cut short; the guard leaves no process behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from fedsplit.apps.config import load_config, output_folder, plain
from fedsplit.apps.launch.run import cut_short

from fedsplit.errors import FedsplitError
from fedsplit.flower.server.checkpoint import Checkpoint, save_checkpoint

COMMAND = ["rounds=5", "train.steps=2"]


def begun(folder: Path, reached: int, finished: bool = False) -> list[str]:
    """Leave behind what a run does that came to round `reached`; return its command."""
    results = {"rounds": [], "summary": {}} if finished else {"rounds": []}
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(load_config(COMMAND))))
    (folder / "results.json").write_text(json.dumps(results))
    if reached:
        save_checkpoint(folder, Checkpoint(reached, {"a": torch.zeros(1)}, {}))
    return [*COMMAND, f"output={folder}"]


def again(command: list[str]) -> tuple[list[str], object]:
    config = load_config(command)
    overrides, config = cut_short(command, config, output_folder(config))
    return list(overrides), config.resume


def test_the_same_command_goes_on_after_the_last_checkpoint(tmp_path: Path) -> None:
    command = begun(tmp_path, reached=2)
    assert again(command) == ([f"resume={tmp_path}"], str(tmp_path))


def test_a_run_that_completed_no_round_begins_anew(tmp_path: Path) -> None:
    command = begun(tmp_path, reached=0)
    assert again(command) == (command, None)
    assert not (tmp_path / "results.json").exists()


def test_a_folder_without_a_run_is_used_as_it_is(tmp_path: Path) -> None:
    command = [*COMMAND, f"output={tmp_path / 'new'}"]
    assert again(command) == (command, None)


def test_another_run_or_a_complete_one_is_left_alone(tmp_path: Path) -> None:
    command = begun(tmp_path, reached=5, finished=True)
    with pytest.raises(FedsplitError, match="to its end"):
        again(command)
    with pytest.raises(FedsplitError, match="another run"):
        again([*command, "seed=7"])
    assert (tmp_path / "results.json").exists()


STARTER = """
import subprocess, sys, time
from fedsplit.apps.launch.guard import Guard
folder, seconds, nap = sys.argv[1:]
inner = "import subprocess, sys, time; "
inner += f"subprocess.Popen(['sleep', '{nap}'], start_new_session=True); time.sleep(2.5)"
with Guard(folder) as guard:
    shell = f'{sys.executable} -c "{inner}"; sleep {nap}'
    guard.watch(subprocess.Popen(["sh", "-c", shell], start_new_session=True))
    time.sleep(float(seconds))
"""


@pytest.mark.parametrize("killed", [True, False])
def test_nothing_is_left_running(tmp_path: Path, killed: bool) -> None:
    """Of what was started, one is in a session of its own and has lost its parent."""
    folder = tmp_path / "home"
    folder.mkdir()
    nap = f"300.{os.getpid()}{int(killed)}"
    seconds = "300" if killed else "5"
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(folder), seconds, nap])

    def napping() -> list[psutil.Process]:
        listed = psutil.process_iter(["cmdline"])
        return [item for item in listed if item.info["cmdline"] == ["sleep", nap]]

    deadline = time.monotonic() + 30
    while len(napping()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if killed:
        os.kill(starter.pid, signal.SIGKILL)
    starter.wait(60)
    deadline = time.monotonic() + 20
    while napping() or folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
