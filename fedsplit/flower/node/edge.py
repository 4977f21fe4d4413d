"""An edge server that is a Flower node: what it is told, what it does, what it answers.

One message hands an edge all that waits for it. It serves the turns from its own stage, with a link
of its own to the cloud, averages them between waves where the plan asks for it, and answers once.
"""

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Message
from torch import Tensor

from fedsplit.errors import FedsplitError, require
from fedsplit.execution import Stage, TurnStatus, weighted_mean
from fedsplit.execution.turn import DONE, FAILED
from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.messages import Contact, Job, answer, read_arrays, read_task
from fedsplit.flower.node.device import at_work
from fedsplit.flower.node.models import cached_model
from fedsplit.models import SplitModel
from fedsplit.plan import EDGE, CodecPlan, Route
from fedsplit.transport import GrpcLink, GrpcServer, OpenRequest, Presence

_POLL_S = 0.02


@dataclass(frozen=True)
class EdgeTurn:
    """One turn that an edge is to serve.

    Who may enter it, where it goes on, its mini-batches (in evaluation, at most), and its weight.
    """

    token: str
    route: str
    n_blocks: int
    codec: CodecPlan
    seed: int
    onward_address: str
    onward_token: str
    steps: int
    weight: float = 1.0


@dataclass(frozen=True)
class EdgeBranch:
    """Turns that an edge is to serve together.

    Either a single one, or the waves of a branch, `width` turns each, with `at_edge`: devices then
    fetch their adapters here, and the edge averages what comes of a wave once it is told which of
    its turns count.
    """

    turns: tuple[EdgeTurn, ...]
    width: int = 1
    at_edge: bool = False

    @property
    def n_waves(self) -> int:
        """How many waves there are."""
        return -(-len(self.turns) // self.width)

    def wave(self, number: int) -> range:
        """Return the places of a wave's turns."""
        start = number * self.width
        return range(start, min(start + self.width, len(self.turns)))


@dataclass(frozen=True)
class EdgeTask:
    """What an edge is told: the branches to serve, and when to give up waiting for them.

    The cloud says so if it gives up a turn; without a word, after `start_s` and `deadline_s`.
    """

    job: Job
    contact: Contact
    branches: tuple[EdgeBranch, ...]
    train: bool
    start_s: float
    deadline_s: float


@dataclass(frozen=True)
class Verdict:
    """Which turns of a wave count; the cloud says so when they are over.

    Of a turn that does not stay at the edge, it says so only if it gave it up.
    """

    branch: int
    wave: int
    counted: tuple[int, ...]

    @classmethod
    def read(cls, words: Mapping[str, Any]) -> "Verdict":
        """Return the verdict that the cloud sent as `words`.

        Raises
        ------
        FedsplitError
            If it is none.
        """
        counted = words.get("counted")
        numbers = [words.get("branch"), words.get("wave")]
        numbers += counted if isinstance(counted, list) else [None]
        whole = all(type(number) is int and number >= 0 for number in numbers)
        require(whole, "words", dict(words), "a branch, a wave and the turns that count")
        return cls(words["branch"], words["wave"], tuple(words["counted"]))


def serve(message: Message, context: Context) -> Message:
    """Serve the turns of a task until each is over; answer with their adapters.

    Raises
    ------
    FedsplitError
        If the node was started without an address to bind, or the cloud is gone.
    """
    task = read_task(message, EdgeTask)
    with at_work(task.contact, context, task.job) as presence:
        return _serve(task, message, context, presence)


def _serve(task: EdgeTask, message: Message, context: Context, presence: Presence) -> Message:
    settings = LinkSettings.of_node(context.node_config)
    if settings.bind is None:
        raise FedsplitError('node-config: an edge must hold bind, such as bind="0.0.0.0:7000"')
    server_tls = settings.server_tls(task.job.security)
    requests = [
        [_request(task, turn, branch.at_edge) for turn in branch.turns] for branch in task.branches
    ]
    segments = {one.route.segments[one.position] for some in requests for one in some}
    model = cached_model(task.job, tuple(sorted(segments, key=str)))
    stage = Stage(model)
    values = read_arrays(message)
    stays = []
    for index, (branch, wanted) in enumerate(zip(task.branches, requests, strict=True)):
        prefix = f"{index}/"
        adapters = {
            name.removeprefix(prefix): tensor
            for name, tensor in values.items()
            if name.startswith(prefix)
        }
        for turn, request in zip(branch.turns, wanted, strict=True):
            stage.open_turn(
                request,
                optimizer=task.job.optimizer if task.train else None,
                downstream=_onward(turn, settings, task.job),
            )
        stays.append(_Stay(stage, model, branch, wanted, adapters))
    with GrpcServer(stage, settings.bind, tls=server_tls, ping_s=task.job.ping_s):
        _wait(task, stays, presence)
    return _answer(message, task, stays)


def _request(task: EdgeTask, turn: EdgeTurn, at_edge: bool) -> OpenRequest:
    route = Route.parse(turn.route, turn.n_blocks)
    position = next(i for i, segment in enumerate(route.segments) if segment.tier == EDGE)
    bounds = task.job.bounds(turn.steps)
    return OpenRequest(
        turn.token, route, position, turn.codec, turn.seed, task.train, at_edge, bounds
    )


def _onward(turn: EdgeTurn, settings: LinkSettings, job: Job) -> tuple[GrpcLink, str] | None:
    if not turn.onward_token:
        return None
    tls = settings.client_tls(job.security)
    return GrpcLink(turn.onward_address, tls=tls, ping_s=job.ping_s), turn.onward_token


class _Stay:
    """A branch at this edge: the wave that is served, and what came of those before it."""

    def __init__(
        self,
        stage: Stage,
        model: SplitModel,
        branch: EdgeBranch,
        requests: Sequence[OpenRequest],
        adapters: dict[str, Tensor],
    ) -> None:
        self.branch = branch
        self.adapters = adapters
        self.reason = ""
        self.ended: dict[int, TurnStatus] = {}
        self._stage, self._model, self._requests = stage, model, requests
        self._wave = 0
        self._given_up = False
        self._supply()

    def is_over(self, waited_s: float, task: EdgeTask) -> bool:
        """Return whether there is nothing left to serve, after waiting so long from the start."""
        if self.branch.at_edge:
            return self._wave == self.branch.n_waves
        state = self._stage.status(self.branch.turns[0].token).state
        late = waited_s > task.start_s + task.deadline_s
        return self._given_up or late or state in (DONE, FAILED)

    def count(self, verdict: Verdict) -> None:
        """Average the turns of the wave that count, and serve the next from what comes of them.

        Raises
        ------
        FedsplitError
            If the verdict is not on this wave, or a turn that counts is not done.
        """
        places = self.branch.wave(self._wave)
        named = verdict.wave == self._wave and set(verdict.counted) <= set(places)
        require(named, "verdict", verdict, f"on wave {self._wave} with turns of {places}")
        if not self.branch.at_edge:
            self._given_up = True
            return
        turns = [self.branch.turns[place] for place in verdict.counted]
        if turns:
            trained = [self._stage.adapters(turn.token) for turn in turns]
            self.adapters |= weighted_mean(trained, [turn.weight for turn in turns])
        for place in places:
            self._close(place)
        self._wave += 1
        if self._wave < self.branch.n_waves:
            self._supply()

    def finish(self, task: EdgeTask) -> None:
        """Take what came of a single turn, or say why nothing did."""
        if self.branch.at_edge:
            return
        token = self.branch.turns[0].token
        status = self._stage.status(token)
        if status.state == DONE:
            self.adapters = self._stage.adapters(token) if task.train else {}
        else:
            self.reason = status.reason or f"its turn was given up while {status.state}"
        self._close(0)

    def _supply(self) -> None:
        """Give the turns of the wave the adapters that they start from."""
        for place in self.branch.wave(self._wave):
            request = self._requests[place]
            own = self._model.adapter_names(request.route.segments[request.position])
            of_device = {n: value for n, value in self.adapters.items() if n not in own}
            self._stage.supply(request.token, self.adapters, of_device)

    def _close(self, place: int) -> None:
        token = self.branch.turns[place].token
        self.ended[place] = self._stage.status(token)
        self._stage.close_turn(token)


def _wait(task: EdgeTask, stays: Sequence[_Stay], presence: Presence) -> None:
    """Serve until all branches are over, and do what the cloud says between waves."""
    inbox: queue.SimpleQueue[dict[str, Any] | FedsplitError] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(presence, inbox), daemon=True).start()
    started = time.monotonic()
    while not all(stay.is_over(time.monotonic() - started, task) for stay in stays):
        try:
            words = inbox.get(timeout=_POLL_S)
        except queue.Empty:
            continue
        if isinstance(words, FedsplitError):
            raise words
        verdict = Verdict.read(words)
        require(verdict.branch < len(stays), "verdict", verdict, f"on one of {len(stays)} branches")
        stays[verdict.branch].count(verdict)


def _listen(
    presence: Presence,
    inbox: "queue.SimpleQueue[dict[str, Any] | FedsplitError]",
) -> None:
    try:
        while True:
            inbox.put(presence.wait_for_words(threading.TIMEOUT_MAX))
    except FedsplitError as error:
        inbox.put(error)


def _answer(message: Message, task: EdgeTask, stays: Sequence[_Stay]) -> Message:
    arrays: dict[str, Tensor] = {}
    metrics: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for index, stay in enumerate(stays):
        stay.finish(task)
        if stay.reason:
            reasons[str(index)] = stay.reason
        elif task.train:
            arrays |= {f"{index}/{name}": tensor for name, tensor in stay.adapters.items()}
        for place, status in stay.ended.items():
            metrics[f"{index}/{place}/up"] = status.stats.up_bytes
            metrics[f"{index}/{place}/down"] = status.stats.down_bytes
    return answer(message, metrics, reasons, arrays)
