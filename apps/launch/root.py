"""The root process of simulated runs: it has everything imported, and forks who needs it.

It has one thread and computes nothing, so that a fork of it is as good as a new process, in a
hundredth of the time, and what one run does is not seen by the next. The first child of a run is
the server, the others are workers, in which devices run. All end at once when the root does, and
the root ends them when the command line or the server ends. A *front* (`.front`) is a child that
orders runs in the command line's place; it sees by itself that the root has ended, and says so.
"""

import gc
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from .engine import Order, Typed, receive
from .front import be_front

if TYPE_CHECKING:
    from .pool import App

Serve: TypeAlias = Callable[[Order, socket.socket], int]

_COMMAND = 0
_OUTPUTS = 1, 2


def main() -> int:
    """Carry out one order after the other, until the command line is gone; return 0."""
    command = socket.socket(fileno=_COMMAND)
    # What is imported stays: looking for garbage in it takes a second, and would make every child
    # copy the pages that it shares with the others.
    gc.disable()
    from ..client_app import app
    from .run import run  # noqa: F401 - for a front
    from .server import serve

    gc.freeze()
    gc.enable()
    _obey([command], serve, app)
    return 0


def _obey(lines: Sequence[socket.socket], serve: "Serve", app: "App") -> None:
    """Carry out what comes over the last of `lines`, until one of them has come to its end."""
    *others, line = lines
    while True:
        readable, _, _ = select.select(lines, [], [])
        if any(other in readable for other in others) or (received := receive(line)) is None:
            return
        order, descriptors = received
        if isinstance(order, Typed):
            _have_front(order, descriptors, lines, serve, app)
            return
        for output in _OUTPUTS:
            os.dup2(descriptors[-1], output)
        code = _carry_out(partial(serve, order), app, lines)
        for descriptor in descriptors:
            os.close(descriptor)
        if code is None:
            return
        with suppress(BrokenPipeError):  # then its end is what comes next
            line.sendall(f"{code}\n".encode())


def _have_front(
    typed: Typed,
    descriptors: Sequence[int],
    lines: Sequence[socket.socket],
    serve: "Serve",
    app: "App",
) -> None:
    """Fork a front for what was typed, and carry out its orders until it has ended."""
    ours, fronts = socket.socketpair()
    front = _fork(partial(be_front, typed, descriptors, fronts), (*lines, ours))
    fronts.close()
    for descriptor in descriptors:
        os.close(descriptor)
    with ours:
        _obey([*lines, ours], serve, app)
    _end([front])


def _carry_out(
    serve: Callable[[socket.socket], int], app: "App", lines: Sequence[socket.socket]
) -> int | None:
    """Have a server and the workers that it asks for do a run; return the server's exit code.

    None if the other end of one of `lines` is gone before it.
    """
    from .pool import receive_worker, work

    alive, alive_end = os.pipe()
    ours, servers = socket.socketpair()

    def child(role: Callable[[], int], *others: socket.socket) -> int:
        return _fork(lambda: _with_root(role, alive, alive_end), (*lines, *others))

    server = child(partial(serve, servers), ours)
    servers.close()
    children = {server}
    try:
        while True:
            readable, _, _ = select.select([*lines, ours], [], [])
            if any(line in readable for line in lines):  # they say nothing but that they are gone
                return None
            connection = receive_worker(ours)
            if connection is None:  # the server is gone
                children.discard(server)
                code = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
                return code if code >= 0 else 128 - code
            with connection:
                children.add(child(partial(work, connection, app), ours))
            # The server's end is noticed above.
            children -= {number for number in children - {server} if _has_ended(number)}
    finally:
        _end(children)
        os.close(alive)
        os.close(alive_end)
        ours.close()


def _end(children: Iterable[int]) -> None:
    for number in children:  # not waited for yet, so the numbers are theirs
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)


def _fork(role: Callable[[], int], others: Iterable[socket.socket]) -> int:
    """Return the number of a child that does `role`, without the sockets `others`, and ends."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        for other in others:
            other.close()
        code = role()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _with_root(role: Callable[[], int], alive: int, alive_end: int) -> int:
    """Do `role`, and end at the latest when the root does."""
    os.close(alive_end)
    threading.Thread(target=_end_with_root, args=(alive,), daemon=True).start()
    return role()


def _end_with_root(alive: int) -> None:
    os.read(alive, 1)
    os._exit(1)


def _has_ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] == child


if __name__ == "__main__":
    sys.exit(main())
