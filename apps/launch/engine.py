"""Starts the processes of one simulated run, and says how it ended.

The run's *root* process (`.root`) is a child of the command line, started afresh; server and
devices are children of the root. No process listens on a network: devices reach the server over a
Unix socket in a folder that only their user can open.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

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
    home = make_home()
    told, cause = os.pipe()
    with (
        Guard(home) as guard,
        log.open("ab") as file,
        os.fdopen(told, "rb") as words,
        os.fdopen(cause, "wb") as tells,
    ):
        order = Order(
            engine=engine,
            overrides=overrides,
            output=str(output),
            devices=devices,
            places=places,
            cause=cause,
        )
        root = subprocess.Popen(
            [sys.executable, "-m", "fedsplit.apps.launch.root"],
            env={
                **environment(home),
                **ray_environment(),
                "TMPDIR": str(home),
                "RAY_TMPDIR": str(home),
                **guard.mark,
            },
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[keep_open, cause],
        )
        tells.close()
        # Its input stays open as long as this process lives, and not a moment longer.
        assert root.stdin is not None
        with suppress(BrokenPipeError):
            root.stdin.write(order.to_json().encode() + b"\n")
            root.stdin.flush()
        while root.poll() is None:
            watch()
            time.sleep(_POLL_S)
        watch()
        os.set_blocking(told, False)  # somebody may hold the other end for a moment
        said = words.read(_MOST_WORDS) or b""
        return _cause(root.returncode, said.decode(errors="replace"))


def _cause(code: int, said: str) -> str | None:
    if code == 0:
        return None
    if said:
        return said
    # A shell's way to say that a signal ended a process.
    number = -code if code < 0 else code - 128
    name = f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""
    return f"the server's process ended without a word{name}"
