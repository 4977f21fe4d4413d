"""What it takes to run Flower's command-line tools as processes of our own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_STOP_S = 10.0
_POLL_S = 0.1

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
serverapp = "fedsplit.apps.server_app:app"
clientapp = "fedsplit.apps.client_app:app"

[tool.flwr.app.config]
hydra = ""
output = ""
"""


def write_app(folder: Path) -> Path:
    """Write a Flower app that runs the installed fedsplit, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(_APP)
    return folder


def spawn(
    command: Sequence[str], variables: Mapping[str, str], folder: Path, log: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start a process that leads a session of its own, so that `end` reaches all it starts."""
    return subprocess.Popen(
        command,
        env=dict(variables),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def is_up(address: tuple[str, int], process: subprocess.Popen[bytes], patience_s: float) -> bool:
    """Wait until `process` listens on `address`; return whether it does before it ends."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(_POLL_S)
            if probe.connect_ex(address) == 0:
                return True
        time.sleep(_POLL_S)
    return False


def newest_run(
    variables: Mapping[str, str], folder: Path, superlink: Sequence[str] = ()
) -> tuple[str, str]:
    """Return status ("finished:completed", ...) and details of the newest run of a SuperLink."""
    listing = subprocess.run(
        [*tool("flwr"), "ls", *superlink, "--format", "json"],
        env=dict(variables),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(listing.stdout)
        newest = answer["runs"][0]
    except (json.JSONDecodeError, KeyError, IndexError):
        return "unknown", listing.stderr.strip() or "the run was not started, or its SuperLink died"
    return str(newest["status"]), str(newest.get("status-details", ""))


def end(process: subprocess.Popen[bytes]) -> None:
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


def tool(name: str) -> list[str]:
    """Return the command of a console script that lies beside this interpreter."""
    script = Path(sys.executable).parent / name
    return [str(script)] if script.exists() else [name]


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]
    finally:
        for item in sockets:
            item.close()
