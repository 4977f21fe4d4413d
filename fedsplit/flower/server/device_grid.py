"""Flower's grid as a wrapped strategy sees it."""

from collections.abc import Collection, Iterable

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsplit.flower.server.roster import Roster


class DeviceGrid(Grid):
    """A grid that shows the devices alone, in the order of their index.

    A wrapped Flower strategy samples from it; node ids are random numbers, so sampling in their
    order would differ from run to run. Devices of the index of one of those `absent` are not shown.
    """

    def __init__(self, grid: Grid, roster: Roster, absent: Collection[int] = ()) -> None:
        self._grid = grid
        self._nodes = [node for node in roster.nodes if node.index not in absent]

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of the devices that are connected, by device index."""
        alive = set(self._grid.get_node_ids())
        return [node.node_id for node in self._nodes if node.node_id in alive]

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
