"""The root process of a simulated run: it has everything imported, and forks who needs it.

It has one thread and computes nothing, so that a fork of it is as good as a new process, in a
hundredth of the time. Its first child is the server, the others are workers, in which devices run.
All end at once when the root does, and the root ends them when the command line or the server
ends.
"""

import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial

from .engine import Order

_INPUT = 0


def main() -> int:
    """Read an order from the input and carry it out; return the exit code."""
    # What is imported stays: looking for garbage in it takes a second, and would make every child
    # copy the pages that it shares with the others.
    gc.disable()
    from ..client_app import app
    from .pool import receive_worker, work
    from .server import serve

    gc.freeze()
    gc.enable()
    order = Order(**json.loads(_read_order()))
    alive, alive_end = os.pipe()
    ours, servers = socket.socketpair()

    def child(role: Callable[[], int], *others: socket.socket) -> int:
        return _fork(role, alive, alive_end, others)

    server = child(partial(serve, order, servers), ours)
    servers.close()
    children = {server}
    try:
        while True:
            readable, _, _ = select.select([_INPUT, ours.fileno()], [], [])
            if _INPUT in readable:  # the command line is gone
                return 1
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
        os.close(_INPUT)
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


def _read_order() -> bytes:
    """Return the order; from then on what is printed goes where the command wants it.

    The second descriptor that comes with it is one to keep open.
    """
    command = socket.socket(fileno=_INPUT)
    text, descriptors, _, _ = socket.recv_fds(command, 1, 2)
    if not text:
        sys.exit(1)
    for output in (1, 2):
        os.dup2(descriptors[0], output)
    os.close(descriptors[0])
    while not text.endswith(b"\n"):
        data = command.recv(1 << 16)
        if not data:
            sys.exit(1)
        text += data
    command.detach()
    return text


if __name__ == "__main__":
    sys.exit(main())
