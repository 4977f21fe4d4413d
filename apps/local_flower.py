"""A SuperLink of our own for one simulated run: own home, own ports, a neutral folder.

Flower's managed local SuperLink outlives the run, and its simulation imports client code from the
folder that SuperLink was started in; a later run from another checkout would then execute stale
code. Here the SuperLink belongs to the run and dies with it.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from fedsplit.errors import FedsplitError

_START_S = 60.0
_STOP_S = 10.0
_POLL_S = 0.1
_ATTEMPTS = 3

_APP = """\
[project]
name = "fedsplit-run"
version = "0.1.0"
description = "One fedsplit run; the code is the installed package's."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedsplit"

[tool.flwr.app.components]
serverapp = "apps.server_app:app"
clientapp = "apps.client_app:app"

[tool.flwr.app.config]
hydra = ""
output = ""
"""

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
        app = self._home / "app"
        app.mkdir()
        (app / "pyproject.toml").write_text(_APP)
        values = self._home / "run.toml"
        values.write_text(
            "".join(f"{key} = {json.dumps(text)}\n" for key, text in settings.items())
        )
        simulation = " ".join(f"{key}={value}" for key, value in federation.items())
        command = [
            *_tool("flwr"),
            *("run", str(app), "--stream", "--run-config", str(values)),
            *("--federation-config", simulation),
        ]
        with self._log.open("ab") as log:
            process = self._spawn(command, log)
            try:
                while process.poll() is None:
                    watch()
                    time.sleep(_POLL_S)
            finally:
                _end(process)
        watch()
        return self._status()

    def _start(self) -> None:
        (self._home / "config.toml").write_text(_FLOWER_CONFIG)
        for attempt in range(_ATTEMPTS):
            http, control = _free_ports(2)
            self._environment = _environment(self._home, http, control)
            with self._log.open("ab") as log:
                self._superlink = self._spawn(
                    [
                        *_tool("flower-superlink"),
                        *("--insecure", "--simulation", "--isolation", "subprocess"),
                        *("--control-api-address", f"127.0.0.1:{control}"),
                        *("--host", "127.0.0.1", "--port", str(http)),
                    ],
                    log,
                )
            if self._is_up(http):
                return
            # Somebody else may have taken a port between our looking and its binding.
            _end(self._superlink)
            if attempt == _ATTEMPTS - 1:
                break
        raise FedsplitError(f"Flower's SuperLink did not start; see {self._log}")

    def _is_up(self, port: int) -> bool:
        assert self._superlink is not None
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._superlink.poll() is None:
            with socket.socket() as probe:
                probe.settimeout(_POLL_S)
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return True
            time.sleep(_POLL_S)
        return False

    def _status(self) -> tuple[str, str]:
        listing = subprocess.run(
            [*_tool("flwr"), "ls", "--format", "json"],
            env=self._environment,
            cwd=self._home,
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            answer: dict[str, Any] = json.loads(listing.stdout)
            newest = answer["runs"][0]
        except (json.JSONDecodeError, KeyError, IndexError):
            return "unknown", listing.stderr.strip() or "the run was not started"
        return str(newest["status"]), str(newest.get("status-details", ""))

    def _spawn(self, command: Sequence[str], log: TextIO | Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            env=self._environment,
            cwd=self._home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _stop(self) -> None:
        if self._superlink is not None:
            _end(self._superlink)
        shutil.rmtree(self._home, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started (it leads a session of its own)."""
    for number, patience in ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, _STOP_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _tool(name: str) -> list[str]:
    """Return the command of a console script that lies beside this interpreter."""
    script = Path(sys.executable).parent / name
    return [str(script)] if script.exists() else [name]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]
    finally:
        for item in sockets:
            item.close()


def _environment(home: Path, http: int, control: int) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Steps are some 10 % faster when freed activations are kept instead of unmapped.
        "MALLOC_MMAP_THRESHOLD_": "1073741824",
        "MALLOC_TRIM_THRESHOLD_": "4294967296",
        "MALLOC_TOP_PAD_": "67108864",
    }
