"""Edge servers that are Flower nodes, as the cloud sees them: what they are given, what comes back.

One message hands an edge all that waits for it, and has one answer; `node.edge` is the other side.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fedsplit.errors import NodeLost
from fedsplit.execution import OptimizerSpec
from fedsplit.flower.messages import (
    EDGE,
    read_arrays,
    read_count,
    read_error,
    read_info,
    read_metrics,
    task_message,
)
from fedsplit.flower.server.host import StageHost
from fedsplit.flower.server.liveness import StartClock
from fedsplit.flower.server.roster import EdgeNode
from fedsplit.flower.tasks import Contact, EdgeBranch, EdgeTask, Job, Verdict
from fedsplit.plan import EDGE as EDGE_TIER
from fedsplit.plan import Failure
from fedsplit.transport.presence import BROKEN, EXPECTED, LEFT


@dataclass(eq=False)
class Assignment:
    """A single turn, or the waves of a branch, handed to an edge, and what became of it.

    Parameters
    ----------
    edge : int
        Index of the edge.
    branch : EdgeBranch
        What it is to serve.
    adapters : mapping of str to Tensor
        What it starts from: its own adapters, and the devices' if they fetch theirs there.
    optimizer : OptimizerSpec or None
        What trains the turns; None if they evaluate.
    links_done : callable
        Whether nothing more will come over the links of all turns.
    trained, failure : dict of str to Tensor, str
        What the edge answered, or why it did not; None before.
    link_bytes : dict of int to dict of str to int
        Bytes of the edge's own links, by place of the turn.
    """

    edge: int
    branch: EdgeBranch
    adapters: Mapping[str, Tensor]
    optimizer: OptimizerSpec | None
    links_done: Callable[[], bool]
    trained: dict[str, Tensor] | None = None
    failure: str | None = None
    link_bytes: dict[int, dict[str, int]] = field(default_factory=dict)
    waves_over: int = 0
    unsaid: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def judge(self, counted: Iterable[int]) -> None:
        """Say which turns of the wave that is over count; `RemoteEdges.tick` passes it on.

        Raises
        ------
        NodeLost
            If the edge has failed.
        """
        if self.failure is not None:
            raise NodeLost(self.failure)
        self.unsaid.append((self.waves_over, tuple(counted)))
        self.waves_over += 1

    def give_up(self) -> None:
        """Say that the only turn does not count any more."""
        self.unsaid.append((self.waves_over, ()))
        self.waves_over += 1

    def is_over(self) -> bool:
        """Return whether the edge has nothing left to do but answer."""
        if self.branch.stays:
            return self.waves_over == self.branch.n_waves
        return self.links_done()

    def is_settled(self) -> bool:
        """Return whether the edge has answered or failed."""
        return self.trained is not None or self.failure is not None


@dataclass(frozen=True)
class _Served:
    """What one message gave to an edge, and the token of its presence."""

    assignments: list[Assignment]
    presence: str


class RemoteEdges:
    """The cloud's side of the edges: hands out turns, collects what comes back.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    host : StageHost
        Keeps the edges' presence.
    job : Job
        What all turns share.
    nodes : mapping of int to EdgeNode
        The edges, by index.
    clock : StartClock
        When an edge that was sent a message has to come.
    on_failure : callable
        Called with each edge that fails, when that is noticed.
    """

    def __init__(
        self,
        grid: Grid,
        host: StageHost,
        *,
        job: Job,
        nodes: Mapping[int, EdgeNode],
        clock: StartClock,
        on_failure: Callable[[Failure], None],
    ) -> None:
        self._grid = grid
        self._host = host
        self._job = job
        self.nodes = nodes
        self._clock = clock
        self._on_failure = on_failure
        self._pending: dict[int, list[Assignment]] = {}
        self._serving: dict[str, _Served] = {}
        self._over_since: dict[str, float] = {}

    def address(self, edge: int) -> str:
        """Return where devices reach `edge`.

        Raises
        ------
        NodeLost
            If no node is this edge.
        """
        if edge not in self.nodes:
            known = ", ".join(str(index) for index in sorted(self.nodes))
            raise NodeLost(f"edge {edge} is no node of this run; there are {known}")
        return self.nodes[edge].address

    def hand_out(self, assignment: Assignment) -> None:
        """Queue a assignment for its edge; `tick` sends it."""
        self._pending.setdefault(assignment.edge, []).append(assignment)

    def tick(self) -> None:
        """Collect answers, send what waits to every edge that is free, say what is unsaid."""
        for reply in self._grid.pull_messages(list(self._serving)):
            served = self._serving[reply.metadata.reply_to_message_id]
            self._end(reply.metadata.reply_to_message_id)
            try:
                self._collect(served.assignments, reply)
            except NodeLost as error:
                self._fail(served.assignments, str(error))
        self._give_up()
        busy = {served.assignments[0].edge for served in self._serving.values()}
        for edge in [edge for edge in self._pending if edge not in busy]:
            assignments = self._pending.pop(edge)
            presence = Contact(self._host.address, self._host.attendance.expect(f"edge {edge}"))
            message = self._message(edge, assignments, presence)
            (message_id,) = self._grid.push_messages([message])
            self._serving[message_id] = _Served(assignments, presence.token)
        for served in self._serving.values():
            for index, assignment in enumerate(served.assignments):
                while assignment.unsaid:
                    verdict = Verdict(index, *assignment.unsaid.pop(0))
                    self._host.attendance.tell(served.presence, asdict(verdict))

    def _give_up(self) -> None:
        """Wait no longer for an edge that is gone, or has long had nothing to do but answer."""
        for message_id, served in list(self._serving.items()):
            if (reason := self._trouble(message_id, served)) is not None:
                self._end(message_id)
                self._fail(served.assignments, reason)

    def _fail(self, assignments: list[Assignment], reason: str) -> None:
        """Give up an edge, and the turns that it had."""
        edge, phase = assignments[0].edge, "train" if assignments[0].optimizer else "evaluate"
        for assignment in assignments:
            assignment.failure = f"edge {edge}: {reason}"
        self._on_failure(Failure(EDGE_TIER, edge, phase, reason, time.time()))

    def _trouble(self, message_id: str, served: "_Served") -> str | None:
        attention = self._host.attendance.look(served.presence)
        if attention.state == BROKEN:
            return attention.reason
        if attention.state == EXPECTED:
            return self._clock.trouble(attention.since_s)
        if not all(assignment.is_over() for assignment in served.assignments):
            return None
        now = time.monotonic()
        patience = self._job.patience
        limit_s = patience.to_start_s if attention.state == LEFT else patience.deadline_s
        late = now > self._over_since.setdefault(message_id, now) + limit_s
        return "no answer after its last step" if late else None

    def _end(self, message_id: str) -> None:
        self._host.attendance.forget(self._serving.pop(message_id).presence)

    def _message(self, edge: int, assignments: list[Assignment], presence: Contact) -> Message:
        task = EdgeTask(
            job=self._job,
            presence=presence,
            branches=tuple(assignment.branch for assignment in assignments),
            train=assignments[0].optimizer is not None,
        )
        arrays = {
            f"{index}/{name}": assignment.adapters[name].to(like.dtype)
            for index, assignment in enumerate(assignments)
            for name, like in self._host.likes(assignment.adapters).items()
        }
        return task_message(self.nodes[edge].node_id, EDGE, task, arrays)

    def _collect(self, assignments: list[Assignment], reply: Message) -> None:
        if reply.has_error():
            raise NodeLost(read_error(reply))
        reasons, metrics = read_info(reply), read_metrics(reply)
        served = {
            index: assignment
            for index, assignment in enumerate(assignments)
            if str(index) not in reasons
        }
        expected = {
            f"{index}/{name}": like
            for index, assignment in served.items()
            for name, like in self._host.likes(
                assignment.adapters if assignment.optimizer else ()
            ).items()
        }
        arrays = read_arrays(reply, expected)
        for index, assignment in enumerate(assignments):
            prefix = f"{index}/"
            if index not in served:
                assignment.failure = f"edge {assignment.edge}: {reasons[str(index)]}"
                continue
            for place, turn in enumerate(assignment.branch.turns):
                if turn.onward is not None and f"{prefix}{place}/up" in metrics:
                    assignment.link_bytes[place] = {
                        f"backhaul-{way}": read_count(metrics, f"{prefix}{place}/{way}")
                        for way in ("up", "down")
                    }
            assignment.trained = {
                name.removeprefix(prefix): tensor
                for name, tensor in arrays.items()
                if name.startswith(prefix)
            }
