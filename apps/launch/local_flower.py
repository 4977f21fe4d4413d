"""A SuperLink of our own for one simulated run: own home, own ports, a neutral folder.

Flower's managed local SuperLink outlives the run, and its simulation imports client code from the
folder that SuperLink was started in; a later run from another checkout would then execute stale
code. Here the SuperLink belongs to the run and dies with it, even if the run is killed.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from fedsplit.errors import FedsplitError

from .flower_tools import (
    end,
    environment,
    free_ports,
    is_up,
    newest_run,
    spawn,
    tool,
    write_app,
)
from .guard import Guard

_START_S = 60.0
_POLL_S = 0.1
_ATTEMPTS = 3
# Flower itself misses a simulation that died after a minute. One that ended well takes a moment to
# say so.
_GONE_S = 5.0
_LOOK_S = 1.0

_FLOWER_CONFIG = """\
[superlink]
default = "local"

[superlink.local]
address = ":local-in-memory:"
"""


class LocalFlower:
    """A running SuperLink in simulation mode; a context manager that stops it.

    Parameters
    ----------
    log : Path
        Where the SuperLink and the run write what they print.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._home = Path(tempfile.mkdtemp(prefix="fedsplit-flower-"))
        self._guard = Guard(str(self._home))
        self._superlink: subprocess.Popen[bytes] | None = None
        self._environment: dict[str, str] = {}

    def __enter__(self) -> "LocalFlower":
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def run(
        self,
        settings: Mapping[str, str],
        federation: Mapping[str, int],
        watch: Callable[[], None],
    ) -> tuple[str, str]:
        """Run fedsplit's apps to the end.

        Parameters
        ----------
        settings : mapping of str to str
            Flower run configuration.
        federation : mapping of str to int
            Flower federation configuration, such as ``num-supernodes``.
        watch : callable
            Called every so often while the run goes on.

        Returns
        -------
        tuple of str
            Flower's final status ("finished:completed", ...) and its details.
        """
        app = write_app(self._home / "app")
        values = self._home / "run.toml"
        values.write_text(
            "".join(f"{key} = {json.dumps(text)}\n" for key, text in settings.items())
        )
        simulation = " ".join(f"{key}={value}" for key, value in federation.items())
        command = [
            *tool("flwr"),
            *("run", str(app), "--stream", "--run-config", str(values)),
            *("--federation-config", simulation),
        ]
        assert self._superlink is not None
        pulse = _Pulse(self._superlink.pid)
        with self._log.open("ab") as log:
            process = self._spawn(command, log)
            try:
                while process.poll() is None and not pulse.is_gone():
                    watch()
                    time.sleep(_POLL_S)
            finally:
                end(process)
        watch()
        status, details = newest_run(self._environment, self._home)
        if pulse.is_gone() and not status.startswith("finished"):
            return "died", "the server's process ended without a word"
        return status, details

    def _start(self) -> None:
        (self._home / "config.toml").write_text(_FLOWER_CONFIG)
        for attempt in range(_ATTEMPTS):
            http, control = free_ports(2)
            self._environment = {
                **environment(self._home),
                "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
                "FLWR_LOCAL_CONTROL_API_PORT": str(control),
            }
            with self._log.open("ab") as log:
                self._superlink = self._spawn(
                    [
                        *tool("flower-superlink"),
                        *("--insecure", "--simulation", "--isolation", "subprocess"),
                        *("--control-api-address", f"127.0.0.1:{control}"),
                        *("--host", "127.0.0.1", "--port", str(http)),
                    ],
                    log,
                )
            if is_up(("127.0.0.1", http), self._superlink, _START_S):
                return
            # Somebody else may have taken a port between our looking and its binding.
            end(self._superlink)
            if attempt == _ATTEMPTS - 1:
                break
        raise FedsplitError(f"Flower's SuperLink did not start; see {self._log}")

    def _spawn(self, command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        process = spawn(command, self._environment, self._home, log)
        self._guard.watch(process)
        return process

    def _stop(self) -> None:
        with self._guard:
            if self._superlink is not None:
                end(self._superlink)


class _Pulse:
    """Whether the process that runs server and devices, below the SuperLink, has come and gone."""

    def __init__(self, superlink: int) -> None:
        self._superlink = psutil.Process(superlink)
        self._simulation: psutil.Process | None = None
        self._look_due = 0.0
        self._ended: float | None = None

    def is_gone(self) -> bool:
        now = time.monotonic()
        if self._ended is None and now >= self._look_due:
            self._look_due = now + _LOOK_S
            if self._simulation is None:
                self._simulation = self._find()
            elif not _is_alive(self._simulation):
                self._ended = now
        return self._ended is not None and now > self._ended + _GONE_S

    def _find(self) -> psutil.Process | None:
        with suppress(psutil.NoSuchProcess):
            for child in self._superlink.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if any(word.endswith("flwr-simulation") for word in child.cmdline()):
                        return child
        return None


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
