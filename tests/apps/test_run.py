"""The same command goes on with a run that was cut short; the guard leaves no process behind."""

import io
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
from fedsplit.apps.config import load_config, output_folder
from fedsplit.apps.launch import run as module
from fedsplit.apps.launch.engine import Engine
from fedsplit.apps.launch.front import run_in_front
from fedsplit.apps.launch.run import cut_short, run
from fedsplit.apps.values import plain
from rich.console import Console

from fedsplit.errors import FedsplitError
from fedsplit.flower.server.checkpoint import Checkpoint, save_checkpoint
from fedsplit.report import RoundRecord, RunReport
from fedsplit.report.lock import LOCK, locked
from tests.system.running import wait_until

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


def test_a_folder_holds_one_run_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(FedsplitError, match=rf"is running \(pid {os.getpid()}\)"):
        run([*COMMAND, f"output={tmp_path}"], Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    with locked(tmp_path):
        """It is free again."""


def test_who_inherits_a_lock_keeps_it(tmp_path: Path) -> None:
    with locked(tmp_path) as lock:
        child = subprocess.Popen(["sleep", "300"], pass_fds=[lock])
    try:
        with pytest.raises(FedsplitError, match="is running"), locked(tmp_path):
            raise AssertionError
    finally:
        child.kill()
        child.wait()
    with locked(tmp_path):
        """It is free again."""


@pytest.mark.parametrize(
    ("rounds", "finished", "status"),
    [
        ([0, 1, 2], True, 0),
        ([0, 1, 2], False, 1),
        ([0, 1], True, 1),
        ([], True, 1),
        (None, True, 1),
    ],
)
def test_what_is_complete_is_a_success_even_if_the_server_ends_badly(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rounds: list[int] | None,
    finished: bool,
    status: int,
) -> None:
    """A folder whose summary is an earlier run's (of fewer rounds) is not complete."""

    def die(_: module.Engine, *, output: Path, **__: object) -> str:
        if rounds is not None:
            report = RunReport(output, {}, 2)
            for number in rounds:
                report.add_round(RoundRecord(number, None, 1.0))
            if finished:
                report.finish()
        return "the server's process ended without a word"

    monkeypatch.setattr(module.Engine, "carry_out", die)
    monkeypatch.setattr(module, "check", lambda *_: None)
    console = Console(record=True, quiet=True)
    assert run(["rounds=2", f"output={tmp_path / 'out'}"], console) == status


@pytest.mark.parametrize(("privacy", "lacking"), [("bottleneck", True), ("none", False)])
def test_that_no_adapter_will_be_there_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, privacy: str, lacking: bool
) -> None:
    monkeypatch.setattr(module.Engine, "carry_out", lambda *_, **__: "not in this test")
    monkeypatch.setattr(module, "check", lambda *_: None)
    console = Console(record=True, file=io.StringIO())
    run([f"privacy={privacy}", f"output={tmp_path / 'out'}"], console)
    assert ("adapter/ is not written" in console.export_text()) == lacking


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def look(_: module.Engine, *, output: Path, **__: object) -> str:
        used.append(output)
        return "no matter"

    monkeypatch.setattr(module.Engine, "carry_out", look)
    monkeypatch.setattr(module, "check", lambda *_: None)
    monkeypatch.setattr(time, "strftime", lambda _: "outputs/noon")
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        run(COMMAND, Console(quiet=True))
    assert [path.name for path in used] == ["noon", "noon_2", "noon_3"]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ("file", "must be a folder; File exists"),
        ("file/out", "must be a folder; Not a directory"),
        ("/proc/x", "must be a folder; "),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, words: str
) -> None:
    monkeypatch.setattr(module, "check", lambda *_: None)
    (tmp_path / "file").touch()
    with pytest.raises(FedsplitError, match=words):
        run([*COMMAND, f"output={tmp_path / made}"], Console(quiet=True))


def test_an_engine_and_its_places_are_checked_before_anything_starts(tmp_path: Path) -> None:
    too_many = f"run.concurrency={min(32, (os.cpu_count() or 1) + 4) + 1}"
    for overrides, words in (
        (["run.engine=ray"], "run.engine='ray': must be one of embedded, flower"),
        (["run.engine=flower", too_many], "with run.engine=flower"),
    ):
        with pytest.raises(FedsplitError, match=words):
            run([*COMMAND, *overrides, f"output={tmp_path / 'out'}"], Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_off_a_terminal_something_is_said_while_a_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    console = Console(record=True, file=io.StringIO(), force_terminal=False)
    watch = module.Watch(tmp_path, load_config(COMMAND), console)
    for _ in range(4):
        watch()
    assert console.export_text().splitlines() == ["starting"]
    (tmp_path / "progress.json").write_text(
        json.dumps({"phase": "train", "steps": 3, "planned": 8, "time": 0.0})
    )
    for _ in range(4):
        watch()
    assert console.export_text().splitlines()[-1] == "round 0/5 train: 3/8 steps"


def test_why_the_root_could_not_start_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho a library is missing\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with Engine() as engine:
        assert run_in_front(["rounds=1"], engine) == 1
    said = capfd.readouterr().err
    assert "a library is missing\n" in said
    assert said.endswith("error: the run's process ended without a word\n")


STARTER = """
import os, subprocess, sys, time
from pathlib import Path
from fedsplit.apps.launch.guard import Guard
folder, seconds, nap = sys.argv[1:]
inner = "import subprocess, time; "
inner += f"subprocess.Popen(['sleep', '{nap}'], start_new_session=True)"
with Guard(Path(folder)) as guard:
    shell = f'{sys.executable} -c "{inner}"; exec sleep {nap}'
    environment = {**os.environ, **guard.mark}
    subprocess.Popen(["sh", "-c", shell], env=environment, start_new_session=True)
    stubborn = "trap '' TERM; while :; do sleep 0.1; done"
    subprocess.Popen(["sh", "-c", stubborn, nap], env=environment)
    time.sleep(float(seconds))
"""


@pytest.mark.parametrize("killed", [True, False])
def test_nothing_that_bears_the_mark_is_left_running(tmp_path: Path, killed: bool) -> None:
    """One has a session of its own and has lost its parent, one does not heed SIGTERM."""
    folder = tmp_path / "home"
    folder.mkdir()
    nap = f"300.{os.getpid()}{int(killed)}"
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(folder), "300" if killed else "5", nap]
    )
    bystander = subprocess.Popen(["sleep", nap], start_new_session=True)

    def at_work() -> list[psutil.Process]:
        listed = psutil.process_iter(["cmdline"])
        return [
            item
            for item in listed
            if (item.info["cmdline"] or [""])[0] in ("sleep", "sh")
            and nap == item.info["cmdline"][-1]
            and item.pid != bystander.pid
        ]

    try:
        wait_until(lambda: len(at_work()) == 3, 30)
        if killed:
            os.kill(starter.pid, signal.SIGKILL)
        starter.wait(60)
        wait_until(lambda: not at_work() and not folder.exists(), 10)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
