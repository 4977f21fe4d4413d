"""A process that ends what a run has started once the run's own process is gone, however it went.

Flower's processes put others into sessions of their own, and wait for a running simulation when
they are asked to stop; whoever is killed cannot stop them at all. The guard knows every session
that was ever seen below the processes it is told of, and sweeps them all.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType

import psutil

_LOOK_S = 1.0
_STOP_S = 5.0


class Guard:
    """The run's side: a context manager around everything that it starts.

    Parameters
    ----------
    folder : str
        Removed at the end; "" for none.
    """

    def __init__(self, folder: str = "") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedsplit.apps.launch.guard", folder],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def watch(self, process: "subprocess.Popen[bytes]") -> None:
        """Have a process ended, and all that it starts; it leads a session of its own."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % process.pid)
        self._process.stdin.flush()

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
    """Read process numbers until the input ends, then end them all."""
    roots: list[psutil.Process] = []
    sessions: set[int] = set()
    text = b""
    while True:
        readable, _, _ = select.select([0], [], [], _LOOK_S)
        if readable:
            data = os.read(0, 4096)
            if not data:
                break
            *lines, text = (text + data).split(b"\n")
            for line in lines:
                with suppress(psutil.NoSuchProcess):
                    roots.append(psutil.Process(int(line)))
                    sessions.add(int(line))
        sessions |= _sessions(roots)
    _sweep(sessions | _sessions(roots))
    if sys.argv[1]:
        shutil.rmtree(sys.argv[1], ignore_errors=True)


def _sessions(roots: Iterable[psutil.Process]) -> set[int]:
    found = set()
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            for process in (root, *root.children(recursive=True)):
                with suppress(ProcessLookupError):
                    found.add(os.getsid(process.pid))
    return found


def _sweep(sessions: set[int]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [process for process in psutil.process_iter() if _session(process) in sessions]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(left, _STOP_S)


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return -1


if __name__ == "__main__":
    main()
