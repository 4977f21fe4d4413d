"""One turn over Flower: the task sent, the answer checked, what it leaves."""

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial

from flwr.app import ArrayRecord, Message
from torch import Tensor

from fedsplit.errors import NodeLost
from fedsplit.execution import OptimizerSpec
from fedsplit.flower.messages import (
    EVALUATE,
    TRAIN,
    read_arrays,
    read_error,
    read_metrics,
    task_message,
    to_record,
)
from fedsplit.flower.server.drive import Answer, Await, Call, Lost, Turns, Waited
from fedsplit.flower.server.host import StageHost
from fedsplit.flower.server.liveness import StartClock, Watcher
from fedsplit.flower.server.outcome import check_complete, check_counts, check_update, turn_outcome
from fedsplit.flower.server.roster import Roster
from fedsplit.flower.server.turn_run import Done, TurnRun
from fedsplit.flower.tasks import Contact, Job, TurnTask
from fedsplit.models.ranks import at_rank, factor_of, with_residuals
from fedsplit.plan import DEVICE, EDGE, AdapterWay, Failure, Turn

_TRAINING, _EVALUATION = "train", "evaluate"


@dataclass(frozen=True)
class Work:
    """What a whole phase of a round shares: its number, and what trains it (None: evaluation)."""

    server_round: int
    optimizer: OptimizerSpec | None = None

    @property
    def train(self) -> bool:
        """Whether it trains."""
        return self.optimizer is not None

    def within(self, index: int, count: int) -> "Work":
        """Return the work of the `index`-th of `count` waves."""
        if self.optimizer is None:
            return self
        return replace(self, optimizer=self.optimizer.within(index, count))

    @property
    def phase(self) -> str:
        """Its name: "train" or "evaluate"."""
        return _TRAINING if self.train else _EVALUATION


class TurnRunner:
    """Runs turns whose places on the servers are made.

    Parameters
    ----------
    host : StageHost
        The servers' side of every route.
    job : Job
        What all turns share.
    clock : StartClock
        When a device that was sent its task has to come.
    max_update_norm : float
        The longest update that a turn may bring, in the norm over all of its adapters.
    watcher : Watcher or None
        Sees who works on what; None where devices have to show their presence.
    on_failure : callable
        Called with each device that fails, when that is noticed.
    """

    def __init__(
        self,
        host: StageHost,
        *,
        job: Job,
        clock: StartClock,
        max_update_norm: float,
        watcher: Watcher | None,
        on_failure: Callable[[Failure], None],
    ) -> None:
        self._sent: tuple[dict[str, Tensor], ArrayRecord] = {}, ArrayRecord()
        self._told = job  # of the last message: all of a round share what is trained by
        self.gone: set[int] = set()  # nodes that were lost with their last task
        self._host = host
        self._job = job
        self._clock = clock
        self._max_update_norm = max_update_norm
        self._watcher = watcher
        self._on_failure = on_failure

    def steps(self, work: Work, turn: Turn, roster: Roster) -> int:
        """Return the mini-batches that a turn has to have."""
        if work.train:
            return turn.steps
        held, most = roster.by_index(turn.device).n_test, self._job.max_eval_samples
        return math.ceil((held if most is None else min(held, most)) / self._job.batch_size)

    def attempt(self, work: Work, run: TurnRun, roster: Roster) -> Turns:
        """Run one turn; `TurnRun.result` holds what came of it."""
        try:
            run.result = yield from self._turn(work, run, roster)
        except NodeLost as error:
            run.result = self.lose(work, run.turn.device, error)
            if run.assignment is not None and run.way is not AdapterWay.EDGE:
                run.assignment.give_up()  # its edge need not wait for it
        finally:
            run.discard()

    def lose(self, work: Work, device: int, error: NodeLost) -> Failure:
        """Return the failure of a device, once it was passed on."""
        failure = Failure(DEVICE, device, work.phase, str(error), time.time())
        self._on_failure(failure)
        return failure

    def _turn(self, work: Work, run: TurnRun, roster: Roster) -> Generator[Waited, Answer, Done]:
        """Run one turn; return what it trained (nothing in evaluation) and what it did.

        Its adapters are complete, but for those that stay at an edge.
        """
        reply = yield Call(
            self._task(work, run, roster),
            self.steps(work, run.turn, roster),
            run.steps,
            lambda: run.trouble(self._clock, self._job.patience),
        )
        if isinstance(reply, Lost):
            self.gone.add(roster.by_index(run.turn.device).node_id)
            raise NodeLost(reply.reason)
        assert reply is not None
        self.gone.discard(reply.metadata.src_node_id)
        if reply.has_error():
            raise NodeLost(read_error(reply))
        if run.begun_s is None or run.adapters is None:
            raise NodeLost("answered before its turn began")
        given = run.adapters
        # Before its edge is waited for, which may hear nothing more of such a device.
        outcome = turn_outcome(run.turn, read_metrics(reply), {}, run.begun_s)
        check_counts(outcome, self._job.bounds(self.steps(work, run.turn, roster)))
        own = self._host.adapter_names(run.turn.route, DEVICE)
        trains = work.train and not run.turn.frozen
        carried = own if trains and run.way is AdapterWay.MESSAGE else ()
        trained = read_arrays(reply, at_rank(self._host.likes(carried), run.turn.rank))
        if run.assignment is not None and run.way is not AdapterWay.EDGE:
            trained |= yield from self.from_edge(run)
        if work.train:
            trained |= run.finish()
            if not trains:
                trained |= {name: given[name] for name in own}
            tiers = (DEVICE, EDGE) if run.way is AdapterWay.EDGE else ()
            absent = {
                name for tier in tiers for name in self._host.adapter_names(run.turn.route, tier)
            }
            kept = {n: given[n] for n in given if n not in absent and factor_of(n) is None}
            check_complete(trained, kept)
            check_update(trained, kept, self._max_update_norm)
        return trained, replace(outcome, link_bytes={**outcome.link_bytes, **run.link_bytes()})

    def from_edge(self, run: TurnRun) -> Generator[Waited, Answer, dict[str, Tensor]]:
        """Return what an edge that is a node answers."""
        assignment = run.assignment
        assert assignment is not None
        late = yield Await(assignment.is_settled, self._job.patience.deadline_s)
        if isinstance(late, Lost) or assignment.trained is None:
            raise NodeLost(assignment.failure or f"edge {assignment.edge}: no answer")
        return assignment.trained

    def _task(self, work: Work, run: TurnRun, roster: Roster) -> Message:
        """Return the message that starts a turn, whose device will be seen when it comes."""
        attendance = self._host.attendance
        run.presence = attendance.expect(f"device {run.turn.device}")
        if self._watcher is None or run.adapters is None:
            return self._message(work, run, Contact(self._host.address, run.presence), roster)
        message = self._message(work, run, None, roster)
        self._watcher.when_begun(message, partial(attendance.come, run.presence))
        return message

    def _message(
        self, work: Work, run: TurnRun, presence: Contact | None, roster: Roster
    ) -> Message:
        turn, adapters = run.turn, run.adapters
        optimizer = run.optimizer or self._job.optimizer
        if self._told.optimizer != optimizer:
            self._told = replace(self._job, optimizer=optimizer)
        task = TurnTask(
            job=self._told,
            presence=presence,
            server_round=work.server_round,
            turn=turn,
            seed=run.seed,
            way=run.way,
            door=run.door if adapters is not None else None,
            ahead=adapters is None,
        )
        sent: dict[str, Tensor] = {}
        if adapters is not None and run.way is AdapterWay.MESSAGE:
            names = self._host.adapter_names(turn.route, DEVICE)
            sent = {name: adapters[name] for name in with_residuals(names, adapters)}
        node_id = roster.by_index(turn.device).node_id
        return task_message(
            node_id, TRAIN if work.train else EVALUATE, task, self._serialized(sent)
        )

    def _serialized(self, sent: dict[str, Tensor]) -> ArrayRecord:
        """Return Flower's form of `sent`; branches that start from the same tensors share one."""
        before, record = self._sent
        if before.keys() != sent.keys() or any(before[name] is not sent[name] for name in sent):
            record = to_record(sent)
            self._sent = sent, record
        return record
