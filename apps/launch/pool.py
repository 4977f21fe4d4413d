"""Simulated nodes on forked workers: a Flower grid without a network, and without polling."""

import pickle
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from logging import ERROR
from multiprocessing.connection import Connection
from types import TracebackType

from flwr.app import Context, Error, Message
from flwr.app.user_config import UserConfig
from flwr.common.constant import ErrorCode
from flwr.supercore import log

from fedsplit.errors import FedsplitError
from fedsplit.flower.local_grid import WatchedGrid

_FIRST_NODE = 1000
App = Callable[[Message, Context], Message]


class Pool:
    """Workers that are asked for when they are needed; a context manager.

    A worker serves one message after the other, for any node, and keeps what it has loaded. One
    that dies fails its message; another takes its place.

    Parameters
    ----------
    root : socket.socket
        Leads to the process that forks workers (`receive_worker`).
    places : int
        How many messages are worked on at once.
    """

    def __init__(self, root: socket.socket, places: int) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(places, "place")
        self._place = threading.local()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Whoever still works on a turn that was given up is not waited for.
        self._threads.shutdown(wait=False, cancel_futures=True)

    def submit(
        self, message: Message, context: Context, begin: Callable[[], None]
    ) -> Future[Message]:
        """Have a message worked on, as soon as there is a place, which calls `begin`."""
        return self._threads.submit(self._work, message, context, begin)

    def _work(self, message: Message, context: Context, begin: Callable[[], None]) -> Message:
        begin()
        try:
            worker = self._worker()
            worker.send_bytes(pickle.dumps((message, context), pickle.HIGHEST_PROTOCOL))
            answer: Message
            answer, context.state = pickle.loads(worker.recv_bytes())
        except (EOFError, OSError):
            return Message(
                Error(ErrorCode.UNKNOWN, "its process ended without a word"), reply_to=message
            )
        return answer

    def _worker(self) -> Connection:
        """Return the worker of this thread's place, a new one if it has ended meanwhile."""
        worker: Connection | None = getattr(self._place, "worker", None)
        if worker is None or worker.closed or worker.poll():
            ours, workers = socket.socketpair()
            with workers, self._lock:
                socket.send_fds(self._root, [b"w"], [workers.fileno()])
            worker = self._place.worker = Connection(ours.detach())
        return worker


def receive_worker(server: socket.socket) -> socket.socket | None:
    """Return a new worker's end of its connection to the server; None once the server has ended."""
    try:
        text, descriptors, _, _ = socket.recv_fds(server, 1, 1)
    except ConnectionResetError:
        return None
    return socket.socket(fileno=descriptors[0]) if text else None


def work(connection: socket.socket, app: App) -> int:
    """Answer messages with `app` until the other end closes; return an exit code."""
    with Connection(connection.detach()) as server, suppress(EOFError, OSError):
        while True:
            message, context = pickle.loads(server.recv_bytes())
            found = _answer(app, message, context), context.state
            answer = pickle.dumps(found, pickle.HIGHEST_PROTOCOL)
            server.send_bytes(answer)
    return 0


def _answer(app: App, message: Message, context: Context) -> Message:
    try:
        return app(message, context)
    except Exception as error:
        log(ERROR, "node %s failed", context.node_id, exc_info=error)
        reason = str(error) if isinstance(error, FedsplitError) else repr(error)
        return Message(
            Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason),
            reply_to=message,
        )


class PoolGrid(WatchedGrid):
    """Flower's grid over the workers of a pool: node i is device i, as of a SuperNode.

    Parameters
    ----------
    pool : Pool
        Answers the messages.
    n_nodes : int
        How many nodes there are.
    """

    def __init__(self, pool: Pool, n_nodes: int) -> None:
        super().__init__()
        self._pool = pool
        self._n_nodes = n_nodes

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids, in the order of the devices."""
        return range(_FIRST_NODE, _FIRST_NODE + self._n_nodes)

    def submit(self, message: Message) -> Future[Message]:
        """Have a worker answer."""
        return self._pool.submit(message, self._context(message), self.beginning(message))

    def _context(self, message: Message) -> Context:
        node = message.metadata.dst_node_id
        config: UserConfig = {
            "partition-id": node - _FIRST_NODE,
            "num-partitions": self._n_nodes,
        }
        return self.context(node, config)
