"""A process that ends what a run has started once the run's own process is gone, however it went.

Flower's and Ray's processes put others into sessions of their own, and lose their parents; whoever
is killed cannot stop them at all. Every process of a run has its mark in the environment that it
was started with, and no other process has: the guard ends those that do. A process is told from
a later one with the same number by when it started.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from .surroundings import MARK, environment

# Ctrl-C has to end within 5 s.
_STOP_S = 1.5
_SWEEPS = 10


class Guard:
    """The run's side: a context manager around everything that it starts.

    Parameters
    ----------
    folder : Path or None
        Removed at the end.

    Attributes
    ----------
    mark : dict of str to str
        Has to be in the environment of everything that the guard is to end.
    """

    def __init__(self, folder: Path | None = None) -> None:
        token = secrets.token_hex(16)
        self.mark = {MARK: token}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, token, str(folder or "")],
            stdin=subprocess.PIPE,
            env=environment(folder or Path.cwd()),
            start_new_session=True,
        )

    def __enter__(self) -> "Guard":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The end of its input is the sign, here as when this process is killed.
        self._process.communicate()


def main() -> None:
    """Wait until the input ends, then end everything with the mark."""
    _, token, folder = sys.argv
    os.chdir("/")
    while os.read(0, 4096):
        pass
    sweep(token)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(token: str) -> None:
    """End every process that was started with `token` as its mark, politely first."""
    number = signal.SIGTERM
    for _ in range(_SWEEPS):  # whoever is being ended may start another
        left = marked(token)
        if not left:
            return
        for process in left:
            with suppress(psutil.Error):
                process.send_signal(number)
        psutil.wait_procs(left, _STOP_S)
        number = signal.SIGKILL


def marked(token: str) -> list[psutil.Process]:
    """Return the living processes that were started with `token` as their mark."""
    return [process for process in psutil.process_iter() if _has(process, token)]


def _has(process: psutil.Process, token: str) -> bool:
    try:
        return bool(process.environ().get(MARK) == token)
    except (psutil.Error, OSError):  # somebody else's, or gone
        return False


if __name__ == "__main__":
    main()
