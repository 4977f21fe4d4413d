"""Who takes part: which Flower node is which device of the fleet."""

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from logging import INFO, WARNING
from typing import TypeAlias

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore import log
from flwr.supercore.run import Run

from fedsplit.data.counts import DeviceCounts
from fedsplit.errors import FedsplitError, NodeLost, SettingsError
from fedsplit.flower.messages import (
    HELLO,
    read_count,
    read_error,
    read_info,
    read_metrics,
    task_message,
)
from fedsplit.flower.tasks import Job

MOST_SAMPLES = 10**9
"""Samples that a device may say it has: more weight than this nobody's data have."""
_POLL_S, _LOOK_S = 0.2, 1.0


@dataclass(frozen=True)
class DeviceNode:
    """One device of the federation and what it said of its data."""

    node_id: int
    index: int
    n_train: int
    n_test: int
    counts: DeviceCounts | None = None

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
        if index in self._by_index:
            return self._by_index[index]
        known = ", ".join(str(node.index) for node in self.nodes)
        raise FedsplitError(f"device={index}: must be one of {known}")

    @property
    def node_ids(self) -> frozenset[int]:
        """Node ids of devices and edges."""
        devices = {node.node_id for node in self.nodes}
        return frozenset(devices | {edge.node_id for edge in self.edges})

    def by_node(self, node_id: int) -> DeviceNode:
        """Return the device that runs on Flower node `node_id`."""
        return self._by_node[node_id]

    @cached_property
    def _by_index(self) -> dict[int, DeviceNode]:
        return {node.index: node for node in self.nodes}

    @cached_property
    def _by_node(self) -> dict[int, DeviceNode]:
        return {node.node_id: node for node in self.nodes}


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


def discover(grid: Grid, job: Job, n_edges: int = 0) -> Roster:
    """Wait for the nodes and ask each which device or edge it is.

    A node that answers what cannot be is left out, as if it had not come.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    job : Job
        The run's job; nodes check that they run the same source.
    n_edges : int
        Edge servers that are nodes of their own.

    Raises
    ------
    FedsplitError
        If one of ``job.n_devices`` and `n_edges` is missing after ``job.patience.connect_s``, or
        two nodes say they are the same one; tells what nodes that were left out said.
    """
    patience_s = job.patience.connect_s
    deadline = time.monotonic() + patience_s
    expected = job.n_devices + n_edges
    while len(node_ids := sorted(grid.get_node_ids())) < expected:
        if time.monotonic() > deadline:
            raise FedsplitError(
                f"fleet: {len(node_ids)} of {expected} nodes connected within {patience_s:.0f} s"
            )
        time.sleep(_POLL_S)
    log(INFO, "Asking %s nodes which device they are", len(node_ids))
    replies = grid.send_and_receive(
        [task_message(node_id, HELLO, job) for node_id in node_ids],
        timeout=max(deadline - time.monotonic(), _POLL_S),
    )
    places: _Places = {}
    refused: dict[int, str] = {}
    for reply in replies:
        try:
            node = read_node(reply, job)
        except NodeLost as error:
            refused[reply.metadata.src_node_id] = str(error)
            log(WARNING, "a node is left out: %s", error)
            continue
        if node.place in places:
            role, index = node.place
            raise FedsplitError(f"fleet: two nodes say they are {role} {index}")
        places[node.place] = node
    for role, count in (("device", job.n_devices), ("edge", n_edges)):
        missing = [index for index in range(count) if (role, index) not in places]
        if missing:
            numbers = ", ".join(map(str, missing))
            said = "; ".join(dict.fromkeys(refused.values()))
            why = f"left out: {said}" if said else f"no answer within {patience_s:.0f} s"
            raise FedsplitError(f"fleet: {role} {numbers} is missing ({why})")
    return _roster(places, frozenset(refused))


class Joiners:
    """Nodes that joined since: asked who they are as they come, and nobody waits for them.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    job : Job
        The run's job.
    """

    def __init__(self, grid: Grid, job: Job) -> None:
        self._grid = grid
        self._job = job
        self._asked: dict[str, int] = {}
        self._come: list[Message] = []
        self._look_due = 0.0

    def tick(self, roster: Roster) -> None:
        """Ask those who are new, and collect what those say who were asked; to be called often."""
        if self._asked:
            for reply in self._grid.pull_messages(list(self._asked)):
                self._asked.pop(reply.metadata.reply_to_message_id, None)
                self._come.append(reply)
        if time.monotonic() < self._look_due:
            return
        self._look_due = time.monotonic() + _LOOK_S
        known = roster.node_ids | roster.refused | set(self._asked.values())
        known |= {reply.metadata.src_node_id for reply in self._come}
        joined = sorted(set(self._grid.get_node_ids()) - known)
        messages = [task_message(node_id, HELLO, self._job) for node_id in joined]
        self._asked |= dict(zip(self._grid.push_messages(messages), joined, strict=True))

    def seat(self, roster: Roster, gone: Collection[int]) -> Roster:
        """Return `roster` with those who came in the places of those they replace.

        A device that is started again may be a new node to Flower. It gets its place back if the
        node that has it is not connected any more, or failed and is among those `gone`; whoever
        else names that place stays out.
        """
        if not self._come:
            return roster
        held: list[DeviceNode | EdgeNode] = [*roster.nodes, *roster.edges]
        places: _Places = {node.place: node for node in held}
        alive = set(self._grid.get_node_ids()) - set(gone)
        refused = set(roster.refused)
        for reply in self._come:
            refused.add(reply.metadata.src_node_id)
            try:
                node = read_node(reply, self._job)
                before = places.get(node.place)
                role, index = node.place
                if before is None:
                    raise NodeLost(f"there is no {role} {index}")
                if before.node_id in alive:
                    raise NodeLost(f"{role} {index} is another node, which is still there")
            except NodeLost as error:
                log(WARNING, "a node that joined is left out: %s", error)
                continue
            # Flower may hold the one it replaces for alive, up to a minute after its end.
            refused = refused - {node.node_id} | {before.node_id}
            places[node.place] = node
            log(INFO, "%s %s is back", role, index)
        self._come = []
        return _roster(places, frozenset(refused))


def _roster(places: _Places, refused: frozenset[int]) -> Roster:
    ordered = [places[place] for place in sorted(places)]
    return Roster(
        tuple(node for node in ordered if isinstance(node, DeviceNode)),
        tuple(node for node in ordered if isinstance(node, EdgeNode)),
        refused,
    )


def read_node(reply: Message, job: Job) -> DeviceNode | EdgeNode:
    """Return who a node says it is.

    Raises
    ------
    NodeLost
        If it failed, runs another source, or says what cannot be.
    """
    if reply.has_error():
        raise NodeLost(f"node did not start: {read_error(reply)}")
    info, metrics = read_info(reply), read_metrics(reply)
    node_id, role = reply.metadata.src_node_id, info.get("role")
    index = read_count(metrics, "index")
    if role not in ("device", "edge"):
        raise NodeLost(f"answer: role={role!r:.80} must be device or edge")
    if info.get("source") != job.source:
        raise NodeLost(
            f"{role} {index} runs fedsplit source {info.get('source')!s:.40}, the server "
            f"{job.source}: must be the same; restart the node with this version"
        )
    if role == "edge":
        address = info.get("address", "")
        if not address:
            raise NodeLost(f"edge {index}: names no address")
        return EdgeNode(node_id, index, address)
    if index >= job.n_devices:
        raise NodeLost(f"device {index}: must be below {job.n_devices}")
    counts = [read_count(metrics, name) for name in ("n-train", "n-test")]
    for name, count, least in zip(("n-train", "n-test"), counts, (1, 0), strict=True):
        if not least <= count <= MOST_SAMPLES:
            raise NodeLost(f"device {index}: {name}={count} must be {least} to {MOST_SAMPLES}")
    try:
        held = DeviceCounts.from_flat({name: int(value) for name, value in metrics.items()})
    except SettingsError as error:
        raise NodeLost(f"device {index}: {error}") from error
    n_train, n_test = counts
    return DeviceNode(node_id, index, n_train, n_test, held)
