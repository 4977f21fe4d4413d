"""A ``fedsplit run`` in the middle of its work, and every process that belongs to it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
from fedsplit.apps.launch.guard import marked
from fedsplit.apps.launch.surroundings import MARK

from fedsplit.flower.server.checkpoint import holds_checkpoint

ROOT = "fedsplit.apps.launch.root"
PATIENCE_S = 240.0


def tiny_job(checkpoint: Path, text: Path) -> list[str]:
    """Return the overrides of a job of two devices with a step each."""
    return [
        f"model={checkpoint}",
        "model.r=2",
        "data=text",
        f"data.path={text}",
        "data.seq_len=16",
        "data.min_samples=4",
        "data.partition=iid",
        "fleet.devices=2",
        "rounds=1",
        "train.batch_size=2",
        "train.steps=1",
        "strategy.cut=1",
        "run.accelerator=cpu",
    ]


def start(
    overrides: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    module: str = "fedsplit.apps",
) -> "subprocess.Popen[str]":
    """Start a run."""
    return subprocess.Popen(
        [sys.executable, "-m", module, "run", *overrides],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Wait for something to come about."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Running:
    """A run of many rounds that is at work on one of them.

    Parameters
    ----------
    overrides : sequence of str
        Its job.
    cwd : Path
        Its working folder; its output is ``out`` in it.
    """

    def __init__(self, overrides: Sequence[str], cwd: Path) -> None:
        self.output = cwd / "out"
        self.process = start([*overrides, "rounds=999", "output=out"], cwd)
        # A round is told before it is kept.
        wait_until(
            lambda: (
                (self.rounds() >= 1 and holds_checkpoint(self.output))
                or self.process.poll() is not None
            )
        )
        assert self.process.poll() is None, self.process.communicate()
        below = psutil.Process(self.process.pid).children(recursive=True)
        (self.token,) = filter(None, {item.environ().get(MARK) for item in below})
        self.home = Path(self.part("root").environ()["TMPDIR"])

    def rounds(self) -> int:
        """Return the last round that the results hold."""
        file = self.output / "results.json"
        if not file.exists():
            return -1
        return max(
            (record["round"] for record in json.loads(file.read_text())["rounds"]), default=-1
        )

    def processes(self) -> list[psutil.Process]:
        """Return the processes of the run, but for the command itself and its guard."""
        return marked(self.token)

    def part(self, name: str) -> psutil.Process:
        """Return the ``command``, the ``root``, the ``front``, the ``server`` or a ``worker``."""
        if name == "command":
            return psutil.Process(self.process.pid)
        family = [item for item in self.processes() if ROOT in item.cmdline()]
        numbers = {item.pid for item in family}
        (root,) = [item for item in family if item.ppid() not in numbers]
        children = sorted((item for item in family if item.ppid() == root.pid), key=_age)
        front, server, *_, worker = children
        return {"root": root, "front": front, "server": server, "worker": worker}[name]

    def end(self) -> None:
        """End the run, if it has not ended."""
        self.process.kill()
        self.process.communicate()


def _age(process: psutil.Process) -> tuple[float, int]:
    return process.create_time(), process.pid
