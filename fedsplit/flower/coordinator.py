"""Running a plan over Flower: branches in parallel, the turns of a branch one after the other."""

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.flower.host import OpenTurn, StageHost
from fedsplit.flower.messages import (
    EVALUATE,
    TRAIN,
    Job,
    TurnTask,
    read_arrays,
    read_metrics,
    task_message,
)
from fedsplit.flower.outcome import BranchOutcome, Failure, TurnOutcome
from fedsplit.flower.roster import Roster
from fedsplit.plan import DEVICE, Branch, Turn
from fedsplit.seeds import derive_seed

_POLL_S = 0.02
# A device whose link broke still gets this long to say itself what went wrong.
_LAST_WORDS_S = 2.0


@dataclass(frozen=True)
class _Lost:
    """No answer came; why."""

    reason: str


@dataclass
class _Waiting:
    """A turn whose answer is outstanding."""

    branch: Generator["_Call", "Message | _Lost", None]
    call: "_Call"
    deadline: float
    broken_since: float | None = None


@dataclass(frozen=True)
class _Call:
    """A turn to start: the message to send, and the open turn on the servers behind it."""

    message: Message
    opened: OpenTurn | None


class Coordinator:
    """Runs plans on the devices of a federation.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    host : StageHost
        The servers' side of every route.
    job : Job
        What all turns share.
    roster : Roster
        Which node is which device.
    deadline_s : float
        A turn without an answer after this many seconds is given up.
    """

    def __init__(
        self, grid: Grid, host: StageHost, job: Job, roster: Roster, deadline_s: float
    ) -> None:
        self.job = job
        self.roster = roster
        self._grid = grid
        self._host = host
        self._deadline_s = deadline_s

    def train(
        self, server_round: int, branches: Sequence[Branch], arrays: Mapping[str, Tensor]
    ) -> tuple[BranchOutcome, ...]:
        """Train every branch from the adapters `arrays`; return them in order.

        A device that fails loses its turn: its branch goes on from the adapters before it.
        """
        outcomes: dict[int, BranchOutcome] = {}
        self._drive(
            [
                self._branch(server_round, index, branch, arrays, TRAIN, outcomes)
                for index, branch in enumerate(branches)
            ]
        )
        return tuple(outcomes[index] for index in range(len(branches)))

    def evaluate(
        self, server_round: int, turns: Sequence[Turn], arrays: Mapping[str, Tensor]
    ) -> tuple[tuple[TurnOutcome, ...], tuple[Failure, ...]]:
        """Evaluate the adapters `arrays` on the test data of every turn's device."""
        outcomes: dict[int, BranchOutcome] = {}
        self._drive(
            [
                self._branch(server_round, index, Branch((turn,)), arrays, EVALUATE, outcomes)
                for index, turn in enumerate(turns)
            ]
        )
        ordered = [outcomes[index] for index in range(len(turns))]
        return (
            tuple(turn for outcome in ordered for turn in outcome.turns),
            tuple(failure for outcome in ordered for failure in outcome.failures),
        )

    def _branch(
        self,
        server_round: int,
        index: int,
        branch: Branch,
        arrays: Mapping[str, Tensor],
        kind: str,
        outcomes: dict[int, BranchOutcome],
    ) -> Generator[_Call, Message | _Lost, None]:
        adapters = dict(arrays)
        turns: list[TurnOutcome] = []
        failures: list[Failure] = []
        phase = "train" if kind == TRAIN else "evaluate"
        for turn in branch.turns:
            started = time.monotonic()
            opened = self._open(server_round, index, turn, adapters, kind)
            try:
                reply = yield _Call(
                    self._task(server_round, turn, adapters, kind, opened), opened
                )
                if isinstance(reply, _Lost):
                    raise FedsplitError(reply.reason)
                if reply.has_error():
                    raise FedsplitError(str(reply.error.reason))
                trained = read_arrays(reply)
                if opened is not None:
                    trained |= self._host.finish(opened)
                if kind == TRAIN and trained.keys() != adapters.keys():
                    raise FedsplitError(
                        f"adapters: {len(trained)} came back of {len(adapters)} handed out"
                    )
                metrics = read_metrics(reply)
            except FedsplitError as error:
                log(WARNING, "device %s lost its turn (%s): %s", turn.device, phase, error)
                failures.append(Failure(turn.device, phase, str(error)))
                continue
            finally:
                if opened is not None:
                    self._host.discard(opened)
            adapters |= trained
            turns.append(_turn_outcome(turn, metrics, opened, time.monotonic() - started))
        outcomes[index] = BranchOutcome(index, branch, adapters, tuple(turns), tuple(failures))

    def _open(
        self,
        server_round: int,
        index: int,
        turn: Turn,
        adapters: Mapping[str, Tensor],
        kind: str,
    ) -> OpenTurn | None:
        if len(turn.route.segments) == 1:
            return None
        return self._host.open(
            turn,
            adapters,
            seed=derive_seed(self.job.seed, "turn", server_round, turn.device),
            label=f"round {server_round}, branch {index}, device {turn.device}",
            train=kind == TRAIN,
        )

    def _task(
        self,
        server_round: int,
        turn: Turn,
        adapters: Mapping[str, Tensor],
        kind: str,
        opened: OpenTurn | None,
    ) -> Message:
        task = TurnTask(
            job=self.job,
            server_round=server_round,
            device=turn.device,
            route=str(turn.route),
            n_blocks=turn.route.n_blocks,
            steps=turn.steps,
            codec=turn.codec,
            address=opened.address if opened else "",
            token=opened.token if opened else "",
        )
        names = [
            name
            for segment in turn.route.on(DEVICE)
            for name in self._host.adapter_names(segment, turn.route)
        ]
        node = self.roster.by_index(turn.device)
        return task_message(node.node_id, kind, task, {name: adapters[name] for name in names})

    def _drive(self, branches: list[Generator[_Call, Message | _Lost, None]]) -> None:
        """Run `branches` side by side until each has had all of its turns."""
        waiting: dict[str, _Waiting] = {}

        def advance(
            branch: Generator[_Call, Message | _Lost, None], answer: Message | _Lost | None
        ) -> None:
            try:
                call = next(branch) if answer is None else branch.send(answer)
            except StopIteration:
                return
            (message_id,) = self._grid.push_messages([call.message])
            deadline = time.monotonic() + self._deadline_s
            waiting[message_id] = _Waiting(branch, call, deadline)

        for branch in branches:
            advance(branch, None)
        while waiting:
            answers: dict[str, Message | _Lost] = {
                reply.metadata.reply_to_message_id: reply
                for reply in self._grid.pull_messages(list(waiting))
            }
            for message_id, turn in waiting.items():
                lost = self._lost(turn)
                if lost is not None:
                    answers.setdefault(message_id, lost)
            for message_id, answer in answers.items():
                advance(waiting.pop(message_id).branch, answer)
            if not answers:
                time.sleep(_POLL_S)

    def _lost(self, turn: _Waiting) -> _Lost | None:
        now = time.monotonic()
        if now > turn.deadline:
            return _Lost(f"no answer within {self._deadline_s:.0f} s")
        reason = self._host.failure(turn.call.opened) if turn.call.opened else None
        if reason is None:
            return None
        if turn.broken_since is None:
            turn.broken_since = now
            log(INFO, "link failure: %s", reason)
        return _Lost(reason) if now > turn.broken_since + _LAST_WORDS_S else None


def _turn_outcome(
    turn: Turn, metrics: Mapping[str, float], opened: OpenTurn | None, wall_s: float
) -> TurnOutcome:
    link_bytes = {"up": int(metrics["bytes-up"]), "down": int(metrics["bytes-down"])}
    if opened is not None:
        link_bytes |= opened.link_bytes()
    return TurnOutcome(
        turn=turn,
        loss_sum=metrics["loss-sum"],
        n_targets=int(metrics["n-targets"]),
        n_correct=int(metrics["n-correct"]),
        n_samples=int(metrics["n-samples"]),
        steps=int(metrics["steps"]),
        link_bytes=link_bytes,
        wall_s=wall_s,
    )
