"""The front of a run: does the command line's work in a fork of the root.

The root has imported all that a run takes. Where the command line has not, a fork of the root
checks the job, makes its folder and shows how it goes on, at the command line's own terminal, and
the command line waits for it: the seconds and the memory of those imports are spent once.
"""

import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from .engine import Engine, Typed, read_line

_STANDARD = 0, 1, 2
_FAILED = 1


def run_in_front(overrides: Sequence[str], engine: Engine) -> int:
    """Have a front carry out what was typed; return its exit code.

    The first Ctrl-C is the front's, which then says how to go on; the next one ends it.
    """
    ours, fronts = socket.socketpair()
    with ours:
        with fronts:
            engine.hand_over(overrides, [*map(_open, _STANDARD), fronts.fileno()])
        number = read_line(ours)
        try:
            select.select([ours], [], [])
        except KeyboardInterrupt:
            with suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGINT)
        code = read_line(ours)
    if code:
        return int(code)
    sys.stderr.write(engine.early)
    Console(stderr=True).print("[red]error[/red]: the run's process ended without a word")
    return _FAILED


def be_front(typed: Typed, descriptors: Sequence[int], line: socket.socket) -> int:
    """Carry out what was typed, with the terminal and the root that it came from.

    Parameters
    ----------
    typed : Typed
        What was typed.
    descriptors : sequence of int
        As in `Engine.hand_over`.
    line : socket
        Leads to the root.
    """
    from fedsplit.report.tables import make_console

    from ..refusal import exit_code
    from .run import run

    *standard, words = descriptors
    for number, descriptor in zip(_STANDARD, standard, strict=True):
        os.dup2(descriptor, number)
    os.chdir(typed.folder)
    sys.path[:] = typed.path
    with socket.socket(fileno=words) as command:
        command.sendall(f"{os.getpid()}\n".encode())
        code = _FAILED
        try:
            with Engine(line, Path(typed.early)) as engine:
                code = exit_code(lambda: run(typed.overrides, make_console(), engine))
        except Exception:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        command.sendall(f"{code}\n".encode())
    return code


def _open(number: int) -> int:
    """Return a standard descriptor, or one of nothing where this process was given none."""
    try:
        os.fstat(number)
    except OSError:
        return os.open(os.devnull, os.O_RDWR)
    return number
