"""Running a plan over Flower: branches in parallel, the turns of a branch one after the other."""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
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
from fedsplit.flower.outcome import BranchOutcome, TurnOutcome
from fedsplit.flower.roster import Roster
from fedsplit.plan import DEVICE, Branch, Failure, Turn
from fedsplit.seeds import derive_seed

_POLL_S = 0.02
_PROGRESS_S = 1.0
_PHASES = {TRAIN: "train", EVALUATE: "evaluate"}
# A device whose link broke still gets this long to say itself what went wrong.
_LAST_WORDS_S = 2.0


@dataclass(frozen=True)
class _Lost:
    """No answer came; why."""

    reason: str


@dataclass
class _Waiting:
    """A turn whose answer is outstanding."""

    branch: "_BranchTurns"
    call: "_Call"
    deadline: float
    broken_since: float | None = None


@dataclass(frozen=True)
class _Call:
    """A turn to start: the message to send, and the open turn on the servers behind it."""

    message: Message
    steps: int
    opened: OpenTurn | None


_BranchTurns = Generator[_Call, Message | _Lost, None]


class _Progress:
    """Counts the mini-batches of a phase and tells `report` about once a second."""

    def __init__(
        self, phase: str, planned: int, report: Callable[[str, int, int], None] | None
    ) -> None:
        self.done = 0
        self._phase = phase
        self._planned = planned
        self._report = report
        self._due = time.monotonic()

    def tell(self, under_way: Callable[[], int]) -> None:
        """Report the steps of turns that are done and of those `under_way`."""
        now = time.monotonic()
        if self._report is not None and now >= self._due:
            self._due = now + _PROGRESS_S
            self._report(self._phase, self.done + under_way(), self._planned)


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
    on_progress : callable, optional
        Called about once a second with the phase ("train", "evaluate"), the mini-batches done and
        those planned.
    """

    def __init__(
        self,
        grid: Grid,
        host: StageHost,
        job: Job,
        roster: Roster,
        deadline_s: float,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.job = job
        self.roster = roster
        self._grid = grid
        self._host = host
        self._deadline_s = deadline_s
        self._on_progress = on_progress

    def train(
        self, server_round: int, branches: Sequence[Branch], arrays: Mapping[str, Tensor]
    ) -> tuple[BranchOutcome, ...]:
        """Train every branch from the adapters `arrays`; return them in order.

        A device that fails loses its turn: its branch goes on from the adapters before it.
        """
        return self._run(TRAIN, server_round, branches, arrays)

    def evaluate(
        self, server_round: int, turns: Sequence[Turn], arrays: Mapping[str, Tensor]
    ) -> tuple[tuple[TurnOutcome, ...], tuple[Failure, ...]]:
        """Evaluate the adapters `arrays` on the test data of every turn's device."""
        branches = [Branch((turn,)) for turn in turns]
        outcomes = self._run(EVALUATE, server_round, branches, arrays)
        return (
            tuple(turn for outcome in outcomes for turn in outcome.turns),
            tuple(failure for outcome in outcomes for failure in outcome.failures),
        )

    def _run(
        self,
        kind: str,
        server_round: int,
        branches: Sequence[Branch],
        arrays: Mapping[str, Tensor],
    ) -> tuple[BranchOutcome, ...]:
        outcomes: dict[int, BranchOutcome] = {}
        planned = sum(self._steps(kind, turn) for branch in branches for turn in branch.turns)
        progress = _Progress(_PHASES[kind], planned, self._on_progress)
        self._drive(
            [
                self._branch(server_round, index, branch, arrays, kind, outcomes)
                for index, branch in enumerate(branches)
            ],
            progress,
        )
        return tuple(outcomes[index] for index in range(len(branches)))

    def _steps(self, kind: str, turn: Turn) -> int:
        if kind == TRAIN:
            return turn.steps
        return math.ceil(self.roster.by_index(turn.device).n_test / self.job.batch_size)

    def _branch(
        self,
        server_round: int,
        index: int,
        branch: Branch,
        arrays: Mapping[str, Tensor],
        kind: str,
        outcomes: dict[int, BranchOutcome],
    ) -> _BranchTurns:
        adapters = dict(arrays)
        turns: list[TurnOutcome] = []
        failures: list[Failure] = []
        phase = _PHASES[kind]
        for turn in branch.turns:
            started = time.monotonic()
            opened = self._open(server_round, turn, adapters, kind)
            try:
                message = self._task(server_round, turn, adapters, kind, opened)
                reply = yield _Call(message, self._steps(kind, turn), opened)
                if isinstance(reply, _Lost):
                    raise FedsplitError(reply.reason)
                if reply.has_error():
                    raise FedsplitError(str(reply.error.reason))
                trained = self._collect(reply, adapters, opened) if kind == TRAIN else {}
                outcome = _turn_outcome(turn, read_metrics(reply), opened, started)
            except FedsplitError as error:
                log(WARNING, "device %s lost its turn (%s): %s", turn.device, phase, error)
                failures.append(Failure(turn.device, phase, str(error)))
                continue
            finally:
                if opened is not None:
                    self._host.discard(opened)
            adapters |= trained
            turns.append(outcome)
        outcomes[index] = BranchOutcome(index, branch, adapters, tuple(turns), tuple(failures))

    def _collect(
        self, reply: Message, adapters: Mapping[str, Tensor], opened: OpenTurn | None
    ) -> dict[str, Tensor]:
        """Return the turn's complete adapters: the device's from its reply, the servers' own."""
        trained = read_arrays(reply)
        if opened is not None:
            trained |= self._host.finish(opened)
        if trained.keys() != adapters.keys():
            raise FedsplitError(f"adapters: {len(trained)} came back of {len(adapters)} handed out")
        for name, tensor in trained.items():
            if tensor.shape != adapters[name].shape or not tensor.isfinite().all():
                raise FedsplitError(f"adapter {name!r} came back misshapen or not finite")
        return trained

    def _open(
        self,
        server_round: int,
        turn: Turn,
        adapters: Mapping[str, Tensor],
        kind: str,
    ) -> OpenTurn | None:
        if len(turn.route.segments) == 1:
            return None
        seed = self._seed(server_round, turn)
        return self._host.open(turn, adapters, seed=seed, train=kind == TRAIN)

    def _seed(self, server_round: int, turn: Turn) -> int:
        return derive_seed(self.job.seed, "turn", server_round, turn.device)

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
            seed=self._seed(server_round, turn),
        )
        names = [
            name for segment in turn.route.on(DEVICE) for name in self._host.adapter_names(segment)
        ]
        node = self.roster.by_index(turn.device)
        return task_message(node.node_id, kind, task, {name: adapters[name] for name in names})

    def _drive(self, branches: list[_BranchTurns], progress: _Progress) -> None:
        """Run `branches` side by side until each has had all of its turns."""
        waiting: dict[str, _Waiting] = {}

        def advance(branch: _BranchTurns, answer: Message | _Lost | None) -> None:
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
                turn = waiting.pop(message_id)
                progress.done += turn.call.steps
                advance(turn.branch, answer)
            progress.tell(
                lambda: sum(
                    self._host.steps(turn.call.opened)
                    for turn in waiting.values()
                    if turn.call.opened is not None
                )
            )
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
    turn: Turn, metrics: Mapping[str, float], opened: OpenTurn | None, started: float
) -> TurnOutcome:
    link_bytes = {"up": int(metrics["bytes-up"]), "down": int(metrics["bytes-down"])}
    if opened is not None:
        link_bytes |= opened.link_bytes()
    return TurnOutcome(
        turn=turn,
        loss_sum=metrics["loss-sum"],
        n_targets=int(metrics["n-targets"]),
        n_correct=int(metrics["n-correct"]) if metrics["n-correct"] >= 0 else None,
        n_samples=int(metrics["n-samples"]),
        steps=int(metrics["steps"]),
        link_bytes=link_bytes,
        wall_s=time.monotonic() - started,
    )
