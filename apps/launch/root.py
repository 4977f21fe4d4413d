"""The root process of simulated runs: it has everything imported, and forks who needs it.

It has one thread and computes nothing, so that a fork of it is as good as a new process, in a
hundredth of the time, and what one run does is not seen by the next. The first child of a run is
the server, the others are workers, in which devices run. All end at once when the root does, and
the root ends them when the command line or the server ends.
"""

import gc
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from .engine import receive_order

if TYPE_CHECKING:
    from .pool import App

_COMMAND = 0
_OUTPUTS = 1, 2


def main() -> int:
    """Carry out one order after the other, until the command line is gone; return 0."""
    command = socket.socket(fileno=_COMMAND)
    # What is imported stays: looking for garbage in it takes a second, and would make every child
    # copy the pages that it shares with the others.
    gc.disable()
    from ..client_app import app
    from .server import serve

    gc.freeze()
    gc.enable()
    while (received := receive_order(command)) is not None:
        order, kept = received
        for output in _OUTPUTS:
            os.dup2(kept[-1], output)
        code = _carry_out(partial(serve, order), app, command)
        for descriptor in kept:
            os.close(descriptor)
        if code is None:
            break
        command.sendall(f"{code}\n".encode())
    return 0


def _carry_out(
    serve: Callable[[socket.socket], int], app: "App", command: socket.socket
) -> int | None:
    """Have a server and the workers that it asks for do a run; return the server's exit code.

    None if the command line is gone before it.
    """
    from .pool import receive_worker, work

    alive, alive_end = os.pipe()
    ours, servers = socket.socketpair()

    def child(role: Callable[[], int], *others: socket.socket) -> int:
        return _fork(role, alive, alive_end, others)

    server = child(partial(serve, servers), ours)
    servers.close()
    children = {server}
    try:
        while True:
            readable, _, _ = select.select([command, ours], [], [])
            if command in readable:  # it says nothing during a run but that it is gone
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
        for number in children:  # not waited for yet, so the numbers are theirs
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
        os.close(alive)
        os.close(alive_end)
        ours.close()


def _fork(
    role: Callable[[], int], alive: int, alive_end: int, others: tuple[socket.socket, ...]
) -> int:
    """Return the number of a child that does `role` and ends, at the latest when this one does."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        os.close(alive_end)
        os.close(_COMMAND)
        for other in others:
            other.close()
        threading.Thread(target=_end_with_root, args=(alive,), daemon=True).start()
        code = role()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with_root(alive: int) -> None:
    os.read(alive, 1)
    os._exit(1)


def _has_ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] == child


if __name__ == "__main__":
    sys.exit(main())
