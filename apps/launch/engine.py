"""Starts the processes of one simulated run, and says how it ended.

The run's *root* process (`.root`) is a child of the command line, started afresh; server and
devices are children of the root. No process listens on a network: devices reach the server over a
Unix socket in a folder that only their user can open.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from fedsplit.errors import require

from .guard import Guard
from .surroundings import environment, make_home, ray_environment

EMBEDDED, FLOWER = ENGINES = "embedded", "flower"
_POLL_S = 0.1
_MOST_WORDS = 1 << 15  # what a pipe holds on any system, with room to spare


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the root process is to do.

    Parameters
    ----------
    engine : str
        ``embedded`` (forked workers) or ``flower`` (Flower's own simulation, on Ray).
    overrides : sequence of str
        Of the configuration.
    output : str
        Folder of the run.
    devices, places : int
        Simulated devices, and how many of them run at once.
    cause : int
        Descriptor of a pipe for why the run failed: a full disk takes no files.
    """

    engine: str
    overrides: Sequence[str]
    output: str
    devices: int
    places: int
    cause: int

    def to_json(self) -> str:
        """Return the order as one line."""
        return json.dumps(asdict(self))

    def tell(self, cause: str) -> None:
        """Say why the run failed."""
        os.write(self.cause, cause.encode()[:_MOST_WORDS])


def check_engine(engine: str, places: int) -> None:
    """Refuse what an engine cannot do on this machine.

    Raises
    ------
    FedsplitError
        If there is no such engine, or it cannot run so many devices at once.
    """
    require(engine in ENGINES, "run.engine", engine, f"one of {', '.join(ENGINES)}")
    if engine == FLOWER:
        # The size of the thread pool from which Flower hands out messages.
        most = min(32, (os.cpu_count() or 1) + 4)
        allowed = f"at most {most} with run.engine={FLOWER} on this machine"
        require(places <= most, "run.concurrency", places, allowed)


class Root:
    """The root process of a run, from its start; a context manager that ends all it has started.

    What it has to import takes seconds: it begins with that, and takes its order when it is done.
    """

    def __init__(self) -> None:
        self.home = make_home()
        self._guard = Guard(self.home)
        self._early = self.home / "early.log"
        self._words, self.cause = os.pipe()
        ours, roots = socket.socketpair()
        with self._early.open("ab") as file, roots, os.fdopen(self.cause, "wb"):
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedsplit.apps.launch.root"],
                env={
                    **environment(self.home),
                    **ray_environment(),
                    "TMPDIR": str(self.home),
                    "RAY_TMPDIR": str(self.home),
                    **self._guard.mark,
                },
                cwd=self.home,
                stdin=roots.fileno(),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self.cause],
            )
        # Open as long as this process lives, and not a moment longer.
        self._line = ours

    def __enter__(self) -> "Root":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._line.close()
        os.close(self._words)
        self._guard.__exit__(kind, error, trace)
        self.process.wait()

    def give(self, order: Order, log: IO[bytes], keep_open: int) -> None:
        """Have `order` carried out; what is printed goes to `log`."""
        log.write(self._early.read_bytes())
        log.flush()
        with suppress(BrokenPipeError):
            line = order.to_json().encode() + b"\n"
            socket.send_fds(self._line, [line[:1]], [log.fileno(), keep_open])
            self._line.sendall(line[1:])

    def said(self) -> str:
        """Return why the run failed, if anybody said so."""
        os.set_blocking(self._words, False)  # somebody may hold the other end for a moment
        with suppress(BlockingIOError):
            return os.read(self._words, _MOST_WORDS).decode(errors="replace")
        return ""


def carry_out(
    *,
    engine: str,
    overrides: Sequence[str],
    output: Path,
    devices: int,
    places: int,
    log: Path,
    keep_open: int,
    watch: Callable[[], None],
    root: Root | None = None,
) -> str | None:
    """Run a job to its end.

    Parameters
    ----------
    engine, overrides, output, devices, places
        As in `Order`.
    log : Path
        Where the run's processes write what they print.
    keep_open : int
        A file descriptor (of a lock) that all of them inherit.
    watch : callable
        Called every so often while the run goes on.
    root : Root, optional
        The root process, if it was started before; it is for the caller to end.

    Returns
    -------
    str or None
        Why the run failed; None if it did not.
    """
    with ExitStack() as stack:
        file = stack.enter_context(log.open("ab"))
        root = root or stack.enter_context(Root())
        order = Order(
            engine=engine,
            overrides=overrides,
            output=str(output),
            devices=devices,
            places=places,
            cause=root.cause,
        )
        root.give(order, file, keep_open)
        while root.process.poll() is None:
            watch()
            time.sleep(_POLL_S)
        watch()
        return _cause(root.process.returncode, root.said())


def _cause(code: int, said: str) -> str | None:
    if code == 0:
        return None
    if said:
        return said
    # A shell's way to say that a signal ended a process.
    number = -code if code < 0 else code - 128
    name = f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""
    return f"the server's process ended without a word{name}"
