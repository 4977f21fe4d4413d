"""The server of a real ``fedsplit run``, struck in a round; then the same command again."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

SERVER_KINDS = ("server", "run", "write", "disk", "twice", "root")
ROUNDS, DEVICES, STEPS = 3, 2, 60
PATIENCE_S, GONE_S = 400.0, 10.0


@dataclass(frozen=True)
class ServerOutcome:
    """What came of killing a server.

    Parameters
    ----------
    equal : bool
        Whether the adapters at the end are those of an undisturbed run, bit for bit.
    hung : bool
        Whether a command outstayed its time.
    orphans : int
        Processes of the run that were left ten seconds after its command had ended.
    detect_s : float or None
        Seconds until the command said so and ended (of a second start, until that was refused);
        None if it was killed itself.
    resumed_from : int
        The round of the checkpoint that was found.
    wall_s : float
        Seconds of the command that went on.
    """

    equal: bool
    hung: bool
    orphans: int
    detect_s: float | None
    resumed_from: int
    wall_s: float


class ServerFaults:
    """Runs of one small job in folders of their own, and how the undisturbed one ends.

    Parameters
    ----------
    folder : Path
        Where the runs and their data are put.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "text").mkdir()
        for index in range(DEVICES):
            words = "\n\n".join(f"Device {index} counts {n} and {n * n}." for n in range(99))
            (folder / "text" / f"{index}.txt").write_text(words)
        self._expected: dict[str, torch.Tensor] = {}

    def undisturbed(self) -> bool:
        """Run the job to its end; return whether it came there."""
        finished = self._finish(self._start("undisturbed")) == 0
        if finished:
            self._expected = self._adapters("undisturbed")
        return finished

    def strike(self, name: str, kind: str) -> ServerOutcome:
        """Strike a run called `name` in its second round, and go on with it.

        `kind` is what is killed: "server" (the process that serves and aggregates), "root" (from
        which all are forked), "run" (the command itself) or "write" (the server while it writes a
        checkpoint); or else "disk" (the server can write nothing more) or "twice" (the same
        command is started beside it).
        """
        process = self._start(name)
        below = self._strike(process, name, kind)
        struck = time.monotonic()
        if kind == "twice":
            refused = self._finish(self._start(name))
            detect_s: float | None = time.monotonic() - struck
            status = self._finish(process)
            equal = refused == 2 and status == 0 and _equal(self._adapters(name), self._expected)
            left = _outlive(below)
            hung = None in (refused, status)
            return ServerOutcome(equal, hung, left, detect_s, 0, time.monotonic() - struck)
        hung = self._finish(process) is None
        detect_s = None if kind == "run" else time.monotonic() - struck
        left = _outlive(below)
        resumed_from = self._reached(name)
        started = time.monotonic()
        status = self._finish(self._start(name))
        wall_s = time.monotonic() - started
        equal = status == 0 and _equal(self._adapters(name), self._expected)
        return ServerOutcome(equal, hung or status is None, left, detect_s, resumed_from, wall_s)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        settings = {
            "data": "text",
            "data.path": self._folder / "text",
            "data.seq_len": 16,
            "data.min_samples": 4,
            "fleet.devices": DEVICES,
            "model.r": 2,
            "train.batch_size": 2,
            "train.steps": STEPS,
            "strategy.cut": 1,
            "rounds": ROUNDS,
            "run.concurrency": DEVICES,
            "run.accelerator": "cpu",
            "output": self._folder / name,
        }
        words = [f"{key}={value}" for key, value in settings.items()]
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fedsplit.apps", "run", *words],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=log,
            )

    def _finish(self, process: subprocess.Popen[bytes]) -> int | None:
        """Return the exit code of a run, or None if it has to be killed."""
        try:
            return process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None

    def _strike(
        self, process: subprocess.Popen[bytes], name: str, kind: str
    ) -> list[psutil.Process]:
        """Wait for the moment, and kill; return all processes of the run."""
        output = self._folder / name
        below: list[psutil.Process] = []
        while process.poll() is None:
            first_round_done = self._reached(name) >= 1
            if first_round_done and not below:
                below = psutil.Process(process.pid).children(recursive=True)
            if first_round_done and (
                (output / "checkpoint.new").exists() if kind == "write" else _in_mid_round(output)
            ):
                break
            time.sleep(0.0002 if below else 0.05)
        if kind != "twice":
            with suppress(psutil.NoSuchProcess):
                struck = {"run": [psutil.Process(process.pid)], "root": _roots(below)[:1]}
                for victim in struck.get(kind, _servers(below)):
                    if kind == "disk":
                        victim.rlimit(psutil.RLIMIT_FSIZE, (0, 0))
                    else:
                        victim.kill()
        return below

    def _reached(self, name: str) -> int:
        for place in ("checkpoint", "checkpoint.old"):
            with suppress(OSError, ValueError):
                state = json.loads((self._folder / name / place / "state.json").read_text())
                return int(state["server_round"])
        return 0

    def _adapters(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self._folder / name / "adapter" / "adapter_model.safetensors")


def _in_mid_round(output: Path) -> bool:
    with suppress(OSError, ValueError):
        progress = json.loads((output / "progress.json").read_text())
        return "train" in progress["phase"] and 0 < progress["steps"] < progress["planned"]
    return False


def _roots(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return the run's root process, then its children in the order of their age."""
    family = []
    for process in processes:
        with suppress(psutil.Error):
            if "fedsplit.apps.launch.root" in process.cmdline():
                family.append((process.create_time(), process.pid, process))
    return [process for _, _, process in sorted(family, key=lambda one: one[:2])]


def _servers(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return the first child of the run's root process: the others are devices."""
    return _roots(processes)[1:2]


def _outlive(processes: Sequence[psutil.Process]) -> int:
    """Return how many processes are left, and end those."""
    _, left = psutil.wait_procs(processes, GONE_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return len(left)


def _equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )
