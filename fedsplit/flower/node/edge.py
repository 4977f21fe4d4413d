"""An edge server that is a Flower node: what it is told, what it does, what it answers.

One message hands an edge all that waits for it. It serves the turns from its own stage, with a link
of its own to the cloud, averages them between waves where the plan asks for it, and answers once.
"""

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from flwr.app import Context, Message
from torch import Tensor

from fedsplit.errors import FedsplitError, require
from fedsplit.execution import Stage, TurnStatus, weighted_mean
from fedsplit.execution.status import DONE, FAILED
from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.messages import answer, read_arrays, read_task
from fedsplit.flower.node.device import at_work, own_profile
from fedsplit.flower.node.models import cached_model
from fedsplit.flower.source import source_hash
from fedsplit.flower.tasks import EdgeBranch, EdgeTask, EdgeTurn, Job, Verdict
from fedsplit.models import SplitModel
from fedsplit.plan import EDGE
from fedsplit.transport import GrpcLink, GrpcServer, OpenRequest, Presence

_POLL_S = 0.02


def hello(message: Message, context: Context) -> Message:
    """Say which edge this node is, where devices reach it and which source it runs."""
    job: Job = read_task(message, Job)
    settings = context.node_config
    for key in ("edge-id", "bind"):
        if key not in settings:
            raise FedsplitError(f"node-config: an edge must hold {key}")
    link = LinkSettings.of_node(settings)
    link.server_tls(job.security)
    link.client_tls(job.security)
    return answer(
        message,
        {"index": int(settings["edge-id"])},
        {
            "source": source_hash(),
            "role": "edge",
            "address": str(link.advertise or link.bind),
            "profile": own_profile(context),
        },
    )


def serve(message: Message, context: Context) -> Message:
    """Serve the turns of a task until each is over; answer with their adapters.

    Raises
    ------
    FedsplitError
        If the node was started without an address to bind, or the cloud is gone.
    """
    task = read_task(message, EdgeTask)
    with at_work(task.presence, context, task.job) as presence:
        return _serve(task, message, context, presence)


def _serve(task: EdgeTask, message: Message, context: Context, presence: Presence) -> Message:
    settings = LinkSettings.of_node(context.node_config)
    if settings.bind is None:
        raise FedsplitError('node-config: an edge must hold bind, such as bind="0.0.0.0:7000"')
    server_tls = settings.server_tls(task.job.security)
    requests = [
        [_request(task, turn, branch.stays) for turn in branch.turns] for branch in task.branches
    ]
    segments = {one.route.segments[one.position] for some in requests for one in some}
    model = cached_model(task.job, tuple(sorted(segments, key=str)))
    stage = Stage(model, task.job.limits)
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
                optimizer=turn.optimizer,
                downstream=_onward(turn, settings, task.job),
            )
        stays.append(_Stay(stage, model, branch, wanted, adapters))
    server = GrpcServer(
        stage,
        settings.bind,
        tls=server_tls,
        limits=task.job.limits,
        ping_s=task.job.patience.ping_s,
    )
    with server:
        _wait(task, stays, presence)
    return _answer(message, task, stays)


def _request(task: EdgeTask, turn: EdgeTurn, stays: bool) -> OpenRequest:
    route = turn.turn.route
    position = next(i for i, segment in enumerate(route.segments) if segment.tier == EDGE)
    bounds = task.job.bounds(turn.steps)
    return OpenRequest(
        turn.token,
        route,
        position,
        codec=turn.turn.codec,
        seed=turn.seed,
        train=task.train,
        adapters_on_link=stays,
        bounds=bounds,
    )


def _onward(turn: EdgeTurn, settings: LinkSettings, job: Job) -> tuple[GrpcLink, str] | None:
    if turn.onward is None:
        return None
    tls, patience = settings.client_tls(job.security), job.patience
    link = GrpcLink(
        turn.onward.address, tls=tls, reply_timeout_s=patience.reply_s, ping_s=patience.ping_s
    )
    return link, turn.onward.token


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
        if self.branch.stays:
            return self._wave == self.branch.n_waves
        state = self._stage.status(self.branch.turns[0].token).state
        patience = task.job.patience
        late = waited_s > patience.to_start_s + patience.deadline_s
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
        if not self.branch.stays:
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
        if self.branch.stays:
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
