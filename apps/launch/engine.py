"""Starts the processes of simulated runs, and says how each ended.

The *root* process (`.root`) is a child of the command line, started afresh; server and devices are
children of the root, and so is the *front* (`.front`), which does the command line's own work where
that has not imported yet what it takes. No process listens on a network: devices reach the server
over a Unix socket in a folder that only their user can open.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from fedsplit.errors import require

from .guard import Guard
from .surroundings import environment, make_home, ray_environment

EMBEDDED, FLOWER = ENGINES = "embedded", "flower"
_POLL_S = 0.1
_ORDER, _TYPED = b"o", b"t"
_MOST_DESCRIPTORS = 4
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

    def tell(self, cause: str) -> None:
        """Say why the run failed."""
        os.write(self.cause, cause.encode()[:_MOST_WORDS])


@dataclass(frozen=True, kw_only=True)
class Typed:
    """A ``fedsplit run`` as it was typed, for a front to carry out.

    Parameters
    ----------
    overrides : sequence of str
        Of the configuration.
    folder : str
        Working folder.
    path : sequence of str
        Where its Python finds modules.
    early : str
        File of what the root printed before the first order.
    """

    overrides: Sequence[str]
    folder: str
    path: Sequence[str]
    early: str


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


class Engine:
    """Carries out runs, one after the other, with one root: a context manager.

    The root is started for the first run; the next ones find everything imported.

    Parameters
    ----------
    line : socket, optional
        Leads to a root that is there already, which is not ended; else one is started.
    early : Path
        File of what that root printed before the first order.
    """

    def __init__(self, line: socket.socket | None = None, early: Path = Path()) -> None:
        self._stack = ExitStack()
        self._early = early
        self._borrowed = line is not None
        if line is not None:
            self._line = line
        self._root: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def early(self) -> str:
        """What the root printed before the first order: nothing, or why it could not start."""
        return self._early.read_text(errors="replace")

    def hand_over(self, overrides: Sequence[str], descriptors: Sequence[int]) -> None:
        """Have the root fork a front for what was typed.

        Parameters
        ----------
        overrides : sequence of str
            Of the configuration.
        descriptors : sequence of int
            Its standard input and outputs, and of a socket for what it says (`.front`).
        """
        self._started()
        typed = Typed(
            overrides=overrides, folder=os.getcwd(), path=sys.path, early=str(self._early)
        )
        self._send(_TYPED, descriptors, typed)

    def carry_out(
        self,
        *,
        engine: str,
        overrides: Sequence[str],
        output: Path,
        devices: int,
        places: int,
        log: Path,
        keep_open: int,
        watch: Callable[[], None],
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

        Returns
        -------
        str or None
            Why the run failed; None if it did not.
        """
        with log.open("ab") as file:
            told, cause = os.pipe()
            with os.fdopen(told, "rb") as words:
                with os.fdopen(cause, "wb"):
                    self._started()
                    order = Order(
                        engine=engine,
                        overrides=overrides,
                        output=str(output),
                        devices=devices,
                        places=places,
                        cause=cause,
                    )
                    self._send(_ORDER, [keep_open, cause, file.fileno()], order)
                try:
                    code = self._watched(watch)
                except BaseException:
                    self._end()  # it is in the middle of a run that nobody waits for
                    raise
                file.write(self._early.read_bytes())
                os.set_blocking(told, False)  # somebody may hold the other end for a moment
                said = words.read(_MOST_WORDS) or b""
        return _cause(code, said.decode(errors="replace"))

    def _send(self, kind: bytes, descriptors: Sequence[int], what: Order | Typed) -> None:
        with suppress(BrokenPipeError):
            socket.send_fds(self._line, [kind], descriptors)
            self._line.sendall(json.dumps(asdict(what)).encode() + b"\n")

    def _watched(self, watch: Callable[[], None]) -> int:
        """Return the exit code of the run under way, once it has ended."""
        while not select.select([self._line], [], [], _POLL_S)[0]:
            watch()
        watch()
        answer = read_line(self._line)
        if answer:
            return int(answer)
        return 1 if self._root is None else self._root.wait() or 1

    def _started(self) -> None:
        """See that there is a root; one that has ended is replaced."""
        if self._borrowed or (self._root is not None and self._root.poll() is None):
            return
        self._end()
        home = make_home()
        guard = self._stack.enter_context(Guard(home))
        # Ours stays open as long as this process lives, and not a moment longer.
        self._line, roots = socket.socketpair()
        self._stack.enter_context(self._line)
        self._early = home / "early.log"  # until an order says where to write
        with roots, self._early.open("ab") as log:
            self._root = subprocess.Popen(
                [sys.executable, "-m", "fedsplit.apps.launch.root"],
                env={
                    **environment(home),
                    **ray_environment(),
                    "TMPDIR": str(home),
                    "RAY_TMPDIR": str(home),
                    **guard.mark,
                },
                cwd=home,
                stdin=roots.fileno(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _end(self) -> None:
        self._stack.close()
        if self._root is not None:
            self._root.wait()
        self._root = None


def receive(command: socket.socket) -> tuple[Order | Typed, list[int]] | None:
    """Return what is to be done and the descriptors that come with it; None at the end."""
    try:
        kind, descriptors, _, _ = socket.recv_fds(command, 1, _MOST_DESCRIPTORS)
    except ConnectionResetError:
        return None
    text = read_line(command)
    if not text.endswith(b"\n"):
        return None
    fields = json.loads(text)
    if kind == _TYPED:
        return Typed(**fields), descriptors
    # The descriptor of the pipe is another one here.
    return Order(**{**fields, "cause": descriptors[1]}), descriptors


def read_line(line: socket.socket) -> bytes:
    """Return what comes up to the end of a line, or of what comes at all."""
    text = b""
    with suppress(ConnectionResetError):
        while not text.endswith(b"\n") and (data := line.recv(1 << 16)):
            text += data
    return text


def _cause(code: int, said: str) -> str | None:
    if code == 0:
        return None
    if said:
        return said
    # A shell's way to say that a signal ended a process.
    number = -code if code < 0 else code - 128
    name = f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""
    return f"the server's process ended without a word{name}"
