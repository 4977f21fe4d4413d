"""A federation in one process: a Flower Grid whose nodes are threads running the ClientApp."""

import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from flwr.app import Error, Message
from flwr.clientapp import ClientApp

from fedsplit.flower.local_grid import LocalGrid, WatchedGrid

FIRST_NODE = 1000
N_EDGES = 2


class ThreadGrid(LocalGrid):
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
        super().__init__()
        self._app = app
        self._n_devices = n_nodes
        self._edge_folder = edge_folder
        self._n_nodes = n_nodes + (N_EDGES if edge_folder is not None else 0)
        self._disturb = disturb
        self._pool = ThreadPoolExecutor(concurrency)
        # Edges are machines of their own: they never wait for a device to make room.
        self._edge_pool = ThreadPoolExecutor(N_EDGES)
        self.sent: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        # Flower promises no order.
        return random.Random(time.monotonic_ns()).sample(
            range(FIRST_NODE, FIRST_NODE + self._n_nodes), self._n_nodes
        )

    def submit(self, message: Message) -> Future[Message]:
        self.sent.append(message)
        device = message.metadata.dst_node_id - FIRST_NODE
        pool = self._pool if device < self._n_devices else self._edge_pool
        return pool.submit(self._handle, message)

    def _node_config(self, node: int) -> dict[str, bool | float | int | str]:
        if node < self._n_devices:
            return {"partition-id": node, "num-partitions": self._n_devices}
        edge = node - self._n_devices
        return {"role": "edge", "edge-id": edge, "bind": f"unix:{self._edge_folder}/{edge}.sock"}

    def _handle(self, message: Message) -> Message:
        device = message.metadata.dst_node_id - FIRST_NODE
        context = self.context(message.metadata.dst_node_id, self._node_config(device))
        try:
            if self._disturb is not None:
                self._disturb(message, device)
            return self._app(message, context)
        except Exception as error:
            return Message(Error(1, f"{type(error).__name__}: {error}"), reply_to=message)


class WatchingGrid(ThreadGrid, WatchedGrid):
    """One that sees when a device begins."""

    def _handle(self, message: Message) -> Message:
        self.beginning(message)()
        return super()._handle(message)
