"""Who takes part: which Flower node is which device of the fleet."""

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from logging import INFO

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore import log
from flwr.supercore.run import Run

from fedsplit.errors import FedsplitError
from fedsplit.flower.messages import HELLO, Job, read_info, read_metrics, task_message

_POLL_S = 0.2


@dataclass(frozen=True)
class DeviceNode:
    """One device of the federation and the data it said it has."""

    node_id: int
    index: int
    n_train: int
    n_test: int


@dataclass(frozen=True)
class EdgeNode:
    """One edge server of the federation and where devices reach it."""

    node_id: int
    index: int
    address: str


@dataclass(frozen=True)
class Roster:
    """The devices and edges of a run, by index; without edges, the server hosts that tier."""

    nodes: tuple[DeviceNode, ...]
    edges: tuple[EdgeNode, ...] = ()

    def by_index(self, index: int) -> DeviceNode:
        """Return device `index`.

        Raises
        ------
        FedsplitError
            If no node is this device.
        """
        for node in self.nodes:
            if node.index == index:
                return node
        known = ", ".join(str(node.index) for node in self.nodes)
        raise FedsplitError(f"device={index}: must be one of {known}")

    def by_node(self, node_id: int) -> DeviceNode:
        """Return the device that runs on Flower node `node_id`."""
        return next(node for node in self.nodes if node.node_id == node_id)


class DeviceGrid(Grid):
    """A grid that shows the devices alone, in the order of their index.

    A wrapped Flower strategy samples from it; node ids are random numbers, so sampling in their
    order would differ from run to run.
    """

    def __init__(self, grid: Grid, roster: Roster) -> None:
        self._grid = grid
        self._roster = roster

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of the devices that are connected, by device index."""
        alive = set(self._grid.get_node_ids())
        return [node.node_id for node in self._roster.nodes if node.node_id in alive]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return the connected devices, by device index."""
        by_id = {node.node_id: node for node in self._grid.get_nodes()}
        return [by_id[node_id] for node_id in self.get_node_ids() if node_id in by_id]

    def set_run(self, run: Run) -> None:
        """Set the run of the grid behind."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Run information of the grid behind."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message on the grid behind."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages through the grid behind."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull messages through the grid behind."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send and receive through the grid behind."""
        return self._grid.send_and_receive(messages, timeout=timeout)


def discover(grid: Grid, job: Job, timeout_s: float, n_edges: int = 0) -> Roster:
    """Wait for the nodes and ask each which device or edge it is.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    job : Job
        The run's job; nodes check that they run the same source.
    timeout_s : float
        How long to wait for all of ``job.n_devices`` and `n_edges`.
    n_edges : int
        Edge servers that are nodes of their own.

    Raises
    ------
    FedsplitError
        If nodes are missing after `timeout_s`, say they are the same one, run another source, or
        cannot load the data.
    """
    deadline = time.monotonic() + timeout_s
    expected = job.n_devices + n_edges
    while len(node_ids := sorted(grid.get_node_ids())) < expected:
        if time.monotonic() > deadline:
            raise FedsplitError(
                f"fleet: {len(node_ids)} of {expected} nodes connected within {timeout_s:.0f} s"
            )
        time.sleep(_POLL_S)
    log(INFO, "Asking %s nodes which device they are", len(node_ids))
    replies = grid.send_and_receive(
        [task_message(node_id, HELLO, job) for node_id in node_ids],
        timeout=max(deadline - time.monotonic(), _POLL_S),
    )
    devices: dict[int, DeviceNode] = {}
    edges: dict[int, EdgeNode] = {}
    for reply in replies:
        if reply.has_error():
            raise FedsplitError(f"node did not start: {reply.error.reason}")
        info = read_info(reply)
        index = int(read_metrics(reply)["index"])
        if info["source"] != job.source:
            raise FedsplitError(
                f"{info['role']} {index} runs fedsplit source {info['source']}, the server "
                f"{job.source}: must be the same; restart the node with this version"
            )
        if index in (edges if info["role"] == "edge" else devices):
            raise FedsplitError(f"fleet: two nodes say they are {info['role']} {index}")
        if info["role"] == "edge":
            edges[index] = EdgeNode(reply.metadata.src_node_id, index, info["address"])
        else:
            devices[index] = _device(reply, index)
    _require_all("device", devices, job.n_devices, timeout_s)
    _require_all("edge", edges, n_edges, timeout_s)
    return Roster(
        tuple(devices[index] for index in sorted(devices)),
        tuple(edges[index] for index in sorted(edges)),
    )


def _device(reply: Message, index: int) -> DeviceNode:
    metrics = read_metrics(reply)
    sizes = int(metrics["n-train"]), int(metrics["n-test"])
    return DeviceNode(reply.metadata.src_node_id, index, *sizes)


def _require_all(role: str, found: Collection[int], expected: int, timeout_s: float) -> None:
    missing = sorted(set(range(expected)) - set(found))
    if missing:
        numbers = ", ".join(map(str, missing))
        raise FedsplitError(f"fleet: no answer from {role} {numbers} within {timeout_s:.0f} s")
