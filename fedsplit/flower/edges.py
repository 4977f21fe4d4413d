"""Edge servers that are Flower nodes: what they are told, what they do, what they answer.

One message hands an edge all the turns that wait for it; it serves them from its own stage, with a
link of its own to the cloud, and answers once for all.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.app import Context, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.execution import Stage
from fedsplit.execution.turn import DONE, FAILED, WAITING
from fedsplit.flower.clock import StartClock
from fedsplit.flower.host import StageHost
from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.messages import (
    EDGE,
    Contact,
    Job,
    answer,
    read_arrays,
    read_info,
    read_metrics,
    read_task,
    task_message,
)
from fedsplit.flower.models import cached_model
from fedsplit.flower.roster import EdgeNode
from fedsplit.flower.session import at_work
from fedsplit.plan import EDGE as EDGE_TIER
from fedsplit.plan import CodecPlan, Failure, Route
from fedsplit.transport import GrpcLink, GrpcServer, OpenRequest
from fedsplit.transport.presence import BROKEN, EXPECTED

_POLL_S = 0.02


@dataclass(frozen=True)
class EdgeTurn:
    """One turn that an edge is to serve: who may enter it, and where it goes on."""

    token: str
    route: str
    n_blocks: int
    codec: CodecPlan
    seed: int
    onward_address: str
    onward_token: str


@dataclass(frozen=True)
class EdgeTask:
    """What an edge is told: the turns to serve, and when to give up waiting for them.

    A device has `start_s` to come, and its turn `deadline_s` to be over.
    """

    job: Job
    contact: Contact
    turns: tuple[EdgeTurn, ...]
    train: bool
    start_s: float
    deadline_s: float


def serve(message: Message, context: Context) -> Message:
    """Serve the turns of a task until each is done or failed; answer with their adapters.

    Raises
    ------
    FedsplitError
        If the node was started without an address to bind.
    """
    task = read_task(message, EdgeTask)
    with at_work(task.contact, context, task.job):
        return _serve(task, message, context)


def _serve(task: EdgeTask, message: Message, context: Context) -> Message:
    settings = LinkSettings.of_node(context.node_config)
    if settings.bind is None:
        raise FedsplitError('node-config: an edge must hold bind, such as bind="0.0.0.0:7000"')
    tls = settings.client_tls(task.job.security)
    requests = [_request(turn, task.train) for turn in task.turns]
    segments = {request.route.segments[request.position] for request in requests}
    model = cached_model(task.job, tuple(sorted(segments, key=str)))
    stage = Stage(model)
    values = read_arrays(message)
    for index, (turn, request) in enumerate(zip(task.turns, requests, strict=True)):
        prefix = f"{index}/"
        adapters = {
            name.removeprefix(prefix): tensor
            for name, tensor in values.items()
            if name.startswith(prefix)
        }
        onward = None
        if turn.onward_token:
            link = GrpcLink(turn.onward_address, tls=tls, ping_s=task.job.ping_s)
            onward = link, turn.onward_token
        stage.open_turn(request, adapters, task.job.optimizer if task.train else None, onward)
    server_tls = settings.server_tls(task.job.security)
    with GrpcServer(stage, settings.bind, tls=server_tls, ping_s=task.job.ping_s):
        _wait(stage, task)
    return _answer(message, task, stage)


def _request(turn: EdgeTurn, train: bool) -> OpenRequest:
    route = Route.parse(turn.route, turn.n_blocks)
    position = next(i for i, segment in enumerate(route.segments) if segment.tier == EDGE_TIER)
    return OpenRequest(turn.token, route, position, turn.codec, turn.seed, train)


def _wait(stage: Stage, task: EdgeTask) -> None:
    started = time.monotonic()
    while (waited_s := time.monotonic() - started) < task.deadline_s:
        over = (DONE, FAILED) if waited_s < task.start_s else (DONE, FAILED, WAITING)
        if all(stage.status(turn.token).state in over for turn in task.turns):
            return
        time.sleep(_POLL_S)


def _answer(message: Message, task: EdgeTask, stage: Stage) -> Message:
    arrays: dict[str, Tensor] = {}
    metrics: dict[str, float] = {"turns": len(task.turns)}
    reasons: dict[str, str] = {}
    for index, turn in enumerate(task.turns):
        status = stage.status(turn.token)
        metrics[f"{index}/up"] = status.stats.up_bytes
        metrics[f"{index}/down"] = status.stats.down_bytes
        if status.state == DONE:
            trained = stage.adapters(turn.token) if task.train else {}
            arrays |= {f"{index}/{name}": tensor for name, tensor in trained.items()}
        else:
            limit_s = task.start_s if status.state == WAITING else task.deadline_s
            reasons[str(index)] = status.reason or f"turn {status.state} after {limit_s:.0f} s"
    return answer(message, metrics, reasons, arrays)


@dataclass
class EdgeTicket:
    """A turn handed to an edge, and what became of it; `is_over` says that its links are done."""

    edge: int
    turn: EdgeTurn
    adapters: Mapping[str, Tensor]
    train: bool
    is_over: Callable[[], bool]
    trained: dict[str, Tensor] | None = None
    failure: str | None = None
    link_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Served:
    """The turns of one message to an edge, and the token of its presence."""

    tickets: list[EdgeTicket]
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
    start_s, deadline_s : float
        How long an edge is told to wait for a device to come, and for a turn to be over.
    on_failure : callable
        Called with each edge that fails, when that is noticed.
    """

    def __init__(
        self,
        grid: Grid,
        host: StageHost,
        job: Job,
        nodes: Mapping[int, EdgeNode],
        clock: StartClock,
        start_s: float,
        deadline_s: float,
        on_failure: Callable[[Failure], None],
    ) -> None:
        self._grid = grid
        self._host = host
        self._job = job
        self.nodes = nodes
        self._clock = clock
        self._start_s = start_s
        self._deadline_s = deadline_s
        self._on_failure = on_failure
        self._pending: dict[int, list[EdgeTicket]] = {}
        self._serving: dict[str, _Served] = {}
        self._over_since: dict[str, float] = {}

    def address(self, edge: int) -> str:
        """Return where devices reach `edge`.

        Raises
        ------
        FedsplitError
            If no node is this edge.
        """
        if edge not in self.nodes:
            known = ", ".join(str(index) for index in sorted(self.nodes))
            raise FedsplitError(f"edge={edge}: must be one of {known}")
        return self.nodes[edge].address

    def hand_out(self, ticket: EdgeTicket) -> None:
        """Queue a turn for its edge; `tick` sends it."""
        self._pending.setdefault(ticket.edge, []).append(ticket)

    def tick(self) -> None:
        """Collect answers, and send what waits to every edge that is free."""
        for reply in self._grid.pull_messages(list(self._serving)):
            served = self._serving[reply.metadata.reply_to_message_id]
            self._end(reply.metadata.reply_to_message_id)
            if reply.has_error():
                self._fail(served.tickets, str(reply.error.reason))
            else:
                self._collect(served.tickets, reply)
        self._give_up()
        busy = {served.tickets[0].edge for served in self._serving.values()}
        for edge in [edge for edge in self._pending if edge not in busy]:
            tickets = self._pending.pop(edge)
            contact = self._host.expect(f"edge {edge}")
            message = self._message(edge, tickets, contact)
            (message_id,) = self._grid.push_messages([message])
            self._serving[message_id] = _Served(tickets, contact.token)

    def _give_up(self) -> None:
        """Wait no longer for an edge that is gone, or has long had nothing to do but answer."""
        for message_id, served in list(self._serving.items()):
            if (reason := self._trouble(message_id, served)) is not None:
                self._end(message_id)
                self._fail(served.tickets, reason)

    def _fail(self, tickets: list[EdgeTicket], reason: str) -> None:
        """Give up an edge, and the turns that it had."""
        edge, phase = tickets[0].edge, "train" if tickets[0].train else "evaluate"
        for ticket in tickets:
            ticket.failure = f"edge {edge}: {reason}"
        self._on_failure(Failure(EDGE_TIER, edge, phase, reason, time.time()))

    def _trouble(self, message_id: str, served: "_Served") -> str | None:
        attention = self._host.attendance.look(served.presence)
        if attention.state == BROKEN:
            return attention.reason
        if attention.state == EXPECTED:
            late = self._clock.is_late(attention.since_s)
            return f"did not come within {self._start_s:.0f} s" if late else None
        if not all(ticket.is_over() for ticket in served.tickets):
            return None
        now = time.monotonic()
        late = now > self._over_since.setdefault(message_id, now) + self._start_s
        return "no answer after its last step" if late else None

    def _end(self, message_id: str) -> None:
        self._host.attendance.forget(self._serving.pop(message_id).presence)

    def _message(self, edge: int, tickets: list[EdgeTicket], contact: Contact) -> Message:
        turns = tuple(ticket.turn for ticket in tickets)
        task = EdgeTask(
            self._job, contact, turns, tickets[0].train, self._start_s, self._deadline_s
        )
        arrays = {
            f"{index}/{name}": tensor
            for index, ticket in enumerate(tickets)
            for name, tensor in ticket.adapters.items()
        }
        return task_message(self.nodes[edge].node_id, EDGE, task, arrays)

    @staticmethod
    def _collect(tickets: list[EdgeTicket], reply: Message) -> None:
        arrays, reasons, metrics = read_arrays(reply), read_info(reply), read_metrics(reply)
        for index, ticket in enumerate(tickets):
            prefix = f"{index}/"
            if str(index) in reasons:
                ticket.failure = f"edge {ticket.edge}: {reasons[str(index)]}"
                continue
            if ticket.turn.onward_token:
                ticket.link_bytes = {
                    "backhaul-up": int(metrics[f"{prefix}up"]),
                    "backhaul-down": int(metrics[f"{prefix}down"]),
                }
            ticket.trained = {
                name.removeprefix(prefix): tensor
                for name, tensor in arrays.items()
                if name.startswith(prefix)
            }
