"""Who takes part: which Flower node is which device of the fleet."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import TypeAlias

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore import log
from flwr.supercore.run import Run

from fedsplit.errors import FedsplitError
from fedsplit.flower.messages import (
    HELLO,
    Job,
    read_error,
    read_info,
    read_metrics,
    task_message,
)

_POLL_S = 0.2


@dataclass(frozen=True)
class DeviceNode:
    """One device of the federation and the data it said it has."""

    node_id: int
    index: int
    n_train: int
    n_test: int

    @property
    def place(self) -> tuple[str, int]:
        """Role and index."""
        return "device", self.index


@dataclass(frozen=True)
class EdgeNode:
    """One edge server of the federation and where devices reach it."""

    node_id: int
    index: int
    address: str

    @property
    def place(self) -> tuple[str, int]:
        """Role and index."""
        return "edge", self.index


_Places: TypeAlias = dict[tuple[str, int], DeviceNode | EdgeNode]


@dataclass(frozen=True)
class Roster:
    """The devices and edges of a run, by index; without edges, the server hosts that tier.

    `refused` are nodes that are none of these any more, or never were.
    """

    nodes: tuple[DeviceNode, ...]
    edges: tuple[EdgeNode, ...] = ()
    refused: frozenset[int] = frozenset()

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
    places: _Places = {}
    for reply in replies:
        node = _read_node(reply, job)
        if node.place in places:
            role, index = node.place
            raise FedsplitError(f"fleet: two nodes say they are {role} {index}")
        places[node.place] = node
    for role, count in (("device", job.n_devices), ("edge", n_edges)):
        missing = [index for index in range(count) if (role, index) not in places]
        if missing:
            numbers = ", ".join(map(str, missing))
            raise FedsplitError(f"fleet: no answer from {role} {numbers} within {timeout_s:.0f} s")
    return _roster(places)


def rediscover(grid: Grid, job: Job, roster: Roster, timeout_s: float) -> Roster:
    """Return `roster` with the nodes that joined since in the places of those they replace.

    A device that is started again may be a new node to Flower. Nodes that do not answer within
    `timeout_s`, or not as they must, stay out.
    """
    held: list[DeviceNode | EdgeNode] = [*roster.nodes, *roster.edges]
    places: _Places = {node.place: node for node in held}
    known = {node.node_id for node in held}
    joined = sorted(set(grid.get_node_ids()) - known - roster.refused)
    if not joined:
        return roster
    messages = [task_message(node_id, HELLO, job) for node_id in joined]
    refused = roster.refused | set(joined)
    for reply in grid.send_and_receive(messages, timeout=timeout_s):
        try:
            node = _read_node(reply, job)
        except FedsplitError as error:
            log(WARNING, "a node that joined is left out: %s", error)
            continue
        role, index = node.place
        if node.place not in places:
            log(WARNING, "a node that joined is left out: there is no %s %s", role, index)
            continue
        # Flower may hold the one it replaces for alive, up to a minute after its end.
        refused = refused - {node.node_id} | {places[node.place].node_id}
        places[node.place] = node
        log(INFO, "%s %s is back", role, index)
    return _roster(places, refused)


def _roster(places: _Places, refused: frozenset[int] = frozenset()) -> Roster:
    ordered = [places[place] for place in sorted(places)]
    return Roster(
        tuple(node for node in ordered if isinstance(node, DeviceNode)),
        tuple(node for node in ordered if isinstance(node, EdgeNode)),
        refused,
    )


def _read_node(reply: Message, job: Job) -> DeviceNode | EdgeNode:
    if reply.has_error():
        raise FedsplitError(f"node did not start: {read_error(reply)}")
    info = read_info(reply)
    index = int(read_metrics(reply)["index"])
    if info["source"] != job.source:
        raise FedsplitError(
            f"{info['role']} {index} runs fedsplit source {info['source']}, the server "
            f"{job.source}: must be the same; restart the node with this version"
        )
    if info["role"] == "edge":
        return EdgeNode(reply.metadata.src_node_id, index, info["address"])
    return _device(reply, index)


def _device(reply: Message, index: int) -> DeviceNode:
    metrics = read_metrics(reply)
    sizes = int(metrics["n-train"]), int(metrics["n-test"])
    return DeviceNode(reply.metadata.src_node_id, index, *sizes)
