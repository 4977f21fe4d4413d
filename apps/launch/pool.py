"""Simulated nodes on forked workers: a Flower grid without a network, and without polling."""

import itertools
import pickle
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from logging import ERROR
from multiprocessing.connection import Connection
from types import TracebackType

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore import log
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.errors import FedsplitError

_RUN_ID = 1
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

    def submit(self, message: Message, context: Context) -> Future[Message]:
        """Have a message worked on, as soon as there is a place."""
        return self._threads.submit(self._work, message, context)

    def _work(self, message: Message, context: Context) -> Message:
        try:
            worker = self._worker()
            worker.send_bytes(pickle.dumps((message, context), pickle.HIGHEST_PROTOCOL))
            answer: Message = pickle.loads(worker.recv_bytes())
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
            answer = pickle.dumps(_answer(app, message, context), pickle.HIGHEST_PROTOCOL)
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


class PoolGrid(Grid):
    """Flower's grid over the workers of a pool: node i is device i, as of a SuperNode.

    Parameters
    ----------
    pool : Pool
        Answers the messages.
    n_nodes : int
        How many nodes there are.
    """

    def __init__(self, pool: Pool, n_nodes: int) -> None:
        self._pool = pool
        self._n_nodes = n_nodes
        self._run = Run.create_empty(_RUN_ID)
        self._numbers = itertools.count(1)
        self._replies: dict[str, Future[Message]] = {}
        # Flower's processes get these when they start; no message can be made without.
        TaskIdentity.run_id = TaskIdentity.task_id = _RUN_ID
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run; of this engine, it has nothing but a number."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids, in the order of the devices."""
        return range(_FIRST_NODE, _FIRST_NODE + self._n_nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the nodes, in the order of the devices."""
        return [NodeInfo(node_id=number, status="online") for number in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their numbers."""
        names = []
        for message in messages:
            name = f"message-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = name
            self._replies[name] = self._pool.submit(message, self._context(message))
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that are there of the messages with these numbers."""
        there = [name for name in message_ids if name in self._replies]
        return [self._replies.pop(name).result() for name in there if self._replies[name].done()]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages; return the answers that come within `timeout` seconds."""
        names = list(self.push_messages(messages))
        sent = {self._replies[name]: name for name in names}
        answers: list[Message] = []
        with suppress(TimeoutError):
            for future in as_completed(sent, timeout):
                del self._replies[sent[future]]
                answers.append(future.result())
        return answers

    def _context(self, message: Message) -> Context:
        node = message.metadata.dst_node_id
        return Context(
            run_id=_RUN_ID,
            node_id=node,
            node_config={"partition-id": node - _FIRST_NODE, "num-partitions": self._n_nodes},
            state=RecordDict(),
            run_config={},
        )
