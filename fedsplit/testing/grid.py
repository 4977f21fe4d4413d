"""A federation in one process: a Flower Grid whose nodes are threads running the ClientApp."""

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE = 1000
N_EDGES = 2


class ThreadGrid(Grid):
    """Nodes ``1000, 1001, ...`` are devices ``0, 1, ...``; each message runs in a thread.

    Parameters
    ----------
    app : ClientApp
        What the nodes run.
    n_nodes : int
        How many.
    concurrency : int
        How many messages are worked on at once.
    disturb : callable, optional
        Called with (message, device) before the app; may sleep or raise.
    edge_folder : Path, optional
        If given, two more nodes are edges 0 and 1, with their sockets in this folder.
    """

    def __init__(
        self,
        app: ClientApp,
        n_nodes: int,
        concurrency: int = 4,
        disturb: Callable[[Message, int], None] | None = None,
        edge_folder: Path | None = None,
    ) -> None:
        self._app = app
        self._n_devices = n_nodes
        self._edge_folder = edge_folder
        self._n_nodes = n_nodes + (N_EDGES if edge_folder is not None else 0)
        self._disturb = disturb
        self._pool = ThreadPoolExecutor(concurrency)
        # Edges are machines of their own: they never wait for a device to make room.
        self._edge_pool = ThreadPoolExecutor(N_EDGES)
        self._numbers = itertools.count(1)
        self._replies: dict[str, Future[Message]] = {}
        self._lock = threading.Lock()
        self.sent: list[Message] = []
        # Flower's processes get these when they start; messages cannot be made without.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        # Flower promises no order.
        return random.Random(time.monotonic_ns()).sample(
            range(FIRST_NODE, FIRST_NODE + self._n_nodes), self._n_nodes
        )

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            name = f"message-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = name
            self.sent.append(message)
            with self._lock:
                device = message.metadata.dst_node_id - FIRST_NODE
                pool = self._pool if device < self._n_devices else self._edge_pool
                self._replies[name] = pool.submit(self._handle, message)
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._lock:
            ready = [name for name in message_ids if self._replies[name].done()]
            return [self._replies.pop(name).result() for name in ready]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        deadline = time.monotonic() + (timeout if timeout is not None else 60)
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(0.005)
        return replies

    def _node_config(self, node: int) -> dict[str, bool | float | int | str]:
        if node < self._n_devices:
            return {"partition-id": node, "num-partitions": self._n_devices}
        edge = node - self._n_devices
        return {"role": "edge", "edge-id": edge, "bind": f"unix:{self._edge_folder}/{edge}.sock"}

    def _handle(self, message: Message) -> Message:
        device = message.metadata.dst_node_id - FIRST_NODE
        context = Context(
            run_id=1,
            node_id=message.metadata.dst_node_id,
            node_config=self._node_config(device),
            state=RecordDict(),
            run_config={},
        )
        try:
            if self._disturb is not None:
                self._disturb(message, device)
            return self._app(message, context)
        except Exception as error:
            return Message(Error(1, f"{type(error).__name__}: {error}"), reply_to=message)
