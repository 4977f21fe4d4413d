"""Running a plan over Flower: branches in parallel, the waves of a branch one after the other."""

import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from logging import WARNING

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor

from fedsplit.errors import NodeLost
from fedsplit.execution import OptimizerSpec, weighted_mean
from fedsplit.flower.messages import (
    EVALUATE,
    TRAIN,
    read_arrays,
    read_error,
    read_metrics,
    task_message,
)
from fedsplit.flower.server.drive import Answer, Await, Call, Fork, Lost, Turns, Waited, drive
from fedsplit.flower.server.edges import RemoteEdges
from fedsplit.flower.server.host import StageHost
from fedsplit.flower.server.liveness import StartClock
from fedsplit.flower.server.outcome import (
    BranchOutcome,
    TurnOutcome,
    check_complete,
    turn_outcome,
)
from fedsplit.flower.server.placement import Placement
from fedsplit.flower.server.roster import Joiners, Roster
from fedsplit.flower.server.turn_run import Done, TurnRun
from fedsplit.flower.tasks import Contact, Job, TurnTask
from fedsplit.plan import DEVICE, EDGE, AdapterWay, Branch, Failure, Turn

_TRAINING, _EVALUATION = "train", "evaluate"


class Listener:
    """Is told how a run goes on; by default it does not care."""

    def on_nodes(self, roster: Roster) -> None:
        """Take who takes part, and what their data are, before the first round."""

    def on_progress(self, phase: str, done: int, planned: int) -> None:
        """Take the phase ("train", "evaluate") and its mini-batches, about once a second."""

    def on_failure(self, failure: Failure) -> None:
        """Take a failure of a device or edge, when it is noticed."""


@dataclass(frozen=True)
class _Work:
    """What a whole phase of a round shares."""

    server_round: int
    optimizer: OptimizerSpec | None = None

    @property
    def train(self) -> bool:
        return self.optimizer is not None

    @property
    def phase(self) -> str:
        return _TRAINING if self.train else _EVALUATION


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
    places : int, optional
        Nodes that can work at once, in a simulation; the others wait, and are not late meanwhile.
    start_ahead : bool
        Whether the next devices of a branch are started while the present ones train.
    listener : Listener, optional
        Is told what happens meanwhile.
    """

    def __init__(
        self,
        grid: Grid,
        host: StageHost,
        *,
        job: Job,
        roster: Roster,
        places: int | None = None,
        start_ahead: bool = False,
        listener: Listener | None = None,
    ) -> None:
        self.job = job
        self.roster = roster
        self._grid = grid
        self._host = host
        self._listener = listener or Listener()
        self._start_ahead = start_ahead
        self._failures: list[Failure] = []
        self._clock = StartClock(host.attendance, job.patience.to_start_s, places)
        self._edges: RemoteEdges | None = None
        if roster.edges:
            self._edges = RemoteEdges(
                grid,
                host,
                job=job,
                nodes={edge.index: edge for edge in roster.edges},
                clock=self._clock,
                on_failure=self._fail,
            )
        self._joiners = Joiners(grid, job)
        self._gone: set[int] = set()  # nodes that were lost with their last task
        self._placement = Placement(host, self._edges, job.seed)

    def welcome_back(self) -> None:
        """Take in devices and edges that were started again since; each has its old place."""
        self.roster = self._joiners.seat(self.roster, self._gone)
        self._gone -= self.roster.refused
        if self._edges is not None:
            self._edges.nodes = {edge.index: edge for edge in self.roster.edges}

    def train(
        self,
        server_round: int,
        branches: Sequence[Branch],
        arrays: Mapping[str, Tensor],
        optimizer: OptimizerSpec | None = None,
    ) -> tuple[tuple[BranchOutcome, ...], tuple[Failure, ...]]:
        """Train every branch from the adapters `arrays`; return them in order, and who failed.

        A device that fails loses its turn: its branch goes on from the adapters before it. An
        `optimizer` takes the place of the job's for this round.
        """
        return self._run(_Work(server_round, optimizer or self.job.optimizer), branches, arrays)

    def evaluate(
        self, server_round: int, turns: Sequence[Turn], arrays: Mapping[str, Tensor]
    ) -> tuple[tuple[TurnOutcome, ...], tuple[Failure, ...]]:
        """Evaluate the adapters `arrays` on the test data of every turn's device."""
        branches = [Branch((turn,)) for turn in turns]
        outcomes, failures = self._run(_Work(server_round), branches, arrays)
        return tuple(turn for outcome in outcomes for turn in outcome.turns), failures

    def _run(
        self, work: _Work, branches: Sequence[Branch], arrays: Mapping[str, Tensor]
    ) -> tuple[tuple[BranchOutcome, ...], tuple[Failure, ...]]:
        self._failures = []
        outcomes: dict[int, BranchOutcome] = {}
        planned = sum(self._steps(work, turn) for branch in branches for turn in branch.turns)
        drive(
            self._grid,
            [
                self._branch(work, index, branch, arrays, outcomes)
                for index, branch in enumerate(branches)
            ],
            self._tick,
            lambda done: self._listener.on_progress(work.phase, done, planned),
            self.job.patience.last_words_s,
        )
        return tuple(outcomes[index] for index in range(len(branches))), tuple(self._failures)

    def _tick(self) -> None:
        self._clock.tick()
        self._joiners.tick(self.roster)
        if self._edges is not None:
            self._edges.tick()

    def _fail(self, failure: Failure) -> None:
        """Keep a failure and pass it on, at once."""
        log(WARNING, "%s failed (%s): %s", failure.who, failure.phase, failure.reason)
        self._failures.append(failure)
        if failure.role == EDGE:
            self._gone |= {n.node_id for n in self.roster.edges if n.index == failure.index}
        self._listener.on_failure(failure)

    def _steps(self, work: _Work, turn: Turn) -> int:
        if work.train:
            return turn.steps
        return math.ceil(self.roster.by_index(turn.device).n_test / self.job.batch_size)

    def _branch(
        self,
        work: _Work,
        index: int,
        branch: Branch,
        arrays: Mapping[str, Tensor],
        outcomes: dict[int, BranchOutcome],
    ) -> Turns:
        """Run the waves of a branch, each from what came of the one before.

        At an edge that is a node, adapters stay there in between; if it fails, they are lost, and
        with them all that the branch trained in this round.
        """
        turns: list[TurnOutcome] = []
        failures: list[Failure] = []
        adapters = dict(arrays)
        try:
            if self._edges is not None and branch.way is AdapterWay.EDGE:
                adapters = yield from self._waves_at_edge(work, branch, arrays, turns, failures)
            else:
                adapters = yield from self._waves(work, branch, arrays, turns, failures)
        except NodeLost as error:
            turns = []
            known = {failure.index for failure in failures}
            lost = [device for device in branch.devices if device not in known]
            failures += [self._lose(work, device, error) for device in lost]
        outcomes[index] = BranchOutcome(index, branch, adapters, tuple(turns), tuple(failures))

    def _waves(
        self,
        work: _Work,
        branch: Branch,
        arrays: Mapping[str, Tensor],
        turns: list[TurnOutcome],
        failures: list[Failure],
    ) -> Generator[Waited, Answer, dict[str, Tensor]]:
        """Run waves whose adapters come back to this process after each; return the last ones."""
        adapters, ahead = dict(arrays), list[TurnRun]()
        # Averaged at a server of this process, adapters still go over the devices' links.
        way = AdapterWay.MESSAGE if branch.way is AdapterWay.MESSAGE else AdapterWay.LINK
        try:
            for wave, following in zip(branch.waves, (*branch.waves[1:], ()), strict=True):
                for run in ahead:
                    if run.result is None:
                        run.begin(adapters)
                fresh = [] if ahead else self._start(work, wave, adapters, way)
                runs = ahead or fresh
                ahead = [
                    self._place(work, turn, AdapterWay.LINK)
                    for turn in self._startable(wave, following)
                ]
                begun = [*fresh, *ahead]
                yield Fork([self._attempt(work, run) for run in begun])
                adapters |= yield from self._end_wave(runs, turns, failures)
        finally:
            for run in ahead:
                run.discard()
        return adapters

    def _start(
        self, work: _Work, wave: Sequence[Turn], adapters: Mapping[str, Tensor], way: AdapterWay
    ) -> list[TurnRun]:
        """Place the turns of a wave; each begins with `adapters`."""
        runs = []
        for turn in wave:
            if self._edges is not None and turn.route.on(EDGE):
                runs += self._place_at_edge(work, Branch((turn,)), adapters, way)
            else:
                runs.append(self._place(work, turn, way))
        for run in runs:
            run.begin(adapters)
        return runs

    def _place(self, work: _Work, turn: Turn, way: AdapterWay) -> TurnRun:
        steps = self._steps(work, turn)
        return self._placement.one(
            work.server_round, turn, optimizer=work.optimizer, steps=steps, way=way
        )

    def _place_at_edge(
        self, work: _Work, branch: Branch, adapters: Mapping[str, Tensor], way: AdapterWay
    ) -> list[TurnRun]:
        return self._placement.at_remote_edge(
            work.server_round,
            branch,
            adapters,
            optimizer=work.optimizer,
            steps=[self._steps(work, turn) for turn in branch.turns],
            way=way,
            weights=[self.roster.by_index(turn.device).n_train for turn in branch.turns],
        )

    def _waves_at_edge(
        self,
        work: _Work,
        branch: Branch,
        arrays: Mapping[str, Tensor],
        turns: list[TurnOutcome],
        failures: list[Failure],
    ) -> Generator[Waited, Answer, dict[str, Tensor]]:
        """Run waves between which an edge that is a node keeps the adapters; return the last."""
        adapters = dict(arrays)
        runs = self._place_at_edge(work, branch, adapters, AdapterWay.EDGE)
        assignment = runs[0].assignment
        assert assignment is not None
        try:
            for start in range(0, len(runs), branch.width):
                wave = runs[start : start + branch.width]
                for run in wave:
                    run.begin(adapters)
                yield Fork([self._attempt(work, run) for run in wave])
                adapters |= yield from self._end_wave(wave, turns, failures)
                assignment.judge(run.place for run in wave if isinstance(run.result, tuple))
            adapters |= yield from self._from_edge(runs[0])
        finally:
            for run in runs:
                run.discard()
        check_complete(adapters, arrays)
        places = [branch.turns.index(done.turn) for done in turns]
        turns[:] = [
            replace(done, link_bytes={**done.link_bytes, **runs[place].edge_bytes()})
            for done, place in zip(turns, places, strict=True)
        ]
        return adapters

    def _end_wave(
        self, runs: Sequence[TurnRun], turns: list[TurnOutcome], failures: list[Failure]
    ) -> Generator[Waited, Answer, dict[str, Tensor]]:
        """Wait for the turns of a wave; return the mean of what they trained, by samples."""
        yield Await(partial(_all_ended, runs))
        # In the plan's order, whoever came in first.
        results = [run.result for run in runs]
        failures += [result for result in results if isinstance(result, Failure)]
        finished = [result for result in results if isinstance(result, tuple)]
        if not finished:
            return {}
        turns += [outcome for _, outcome in finished]
        weights = [self.roster.by_index(outcome.turn.device).n_train for _, outcome in finished]
        return weighted_mean([trained for trained, _ in finished], weights)

    def _startable(self, wave: Sequence[Turn], following: Sequence[Turn]) -> Sequence[Turn]:
        """Return the turns of the `following` wave, if their devices can get ready during `wave`.

        They get their adapters over the link from the server, and have nothing else to do.
        """
        busy = {turn.device for turn in wave}
        if self._start_ahead and all(
            turn.device not in busy
            and len(turn.route.segments) > 1
            and (self._edges is None or not turn.route.on(EDGE))
            for turn in following
        ):
            return following
        return ()

    def _attempt(self, work: _Work, run: TurnRun) -> Turns:
        """Run one turn; `TurnRun.result` holds what came of it."""
        try:
            run.result = yield from self._turn(work, run)
        except NodeLost as error:
            run.result = self._lose(work, run.turn.device, error)
            if run.assignment is not None and run.way is not AdapterWay.EDGE:
                run.assignment.give_up()  # its edge need not wait for it
        finally:
            run.discard()

    def _lose(self, work: _Work, device: int, error: NodeLost) -> Failure:
        failure = Failure(DEVICE, device, work.phase, str(error), time.time())
        self._fail(failure)
        return failure

    def _turn(self, work: _Work, run: TurnRun) -> Generator[Waited, Answer, Done]:
        """Run one turn; return what it trained (nothing in evaluation) and what it did.

        Its adapters are complete, but for those that stay at an edge.
        """
        token = self._host.attendance.expect(f"device {run.turn.device}")
        run.presence = token
        presence = Contact(self._host.address, token)
        reply = yield Call(
            self._message(work, run, presence),
            self._steps(work, run.turn),
            run.steps,
            lambda: run.trouble(self._clock, self.job.patience),
        )
        if isinstance(reply, Lost):
            self._gone.add(self.roster.by_index(run.turn.device).node_id)
            raise NodeLost(reply.reason)
        assert reply is not None
        self._gone.discard(reply.metadata.src_node_id)
        if reply.has_error():
            raise NodeLost(read_error(reply))
        if run.begun_s is None or run.adapters is None:
            raise NodeLost("answered before its turn began")
        given = run.adapters
        own = self._host.adapter_names(run.turn.route, DEVICE)
        carried = own if work.train and run.way is AdapterWay.MESSAGE else ()
        trained = read_arrays(reply, {name: given[name] for name in carried})
        if run.assignment is not None and run.way is not AdapterWay.EDGE:
            trained |= yield from self._from_edge(run)
        if work.train:
            trained |= run.finish()
            tiers = (DEVICE, EDGE) if run.way is AdapterWay.EDGE else ()
            absent = {
                name for tier in tiers for name in self._host.adapter_names(run.turn.route, tier)
            }
            check_complete(trained, {name: given[name] for name in given if name not in absent})
        outcome = turn_outcome(run.turn, read_metrics(reply), run.link_bytes(), run.begun_s)
        return trained, outcome

    def _from_edge(self, run: TurnRun) -> Generator[Waited, Answer, dict[str, Tensor]]:
        """Return what an edge that is a node answers."""
        assignment = run.assignment
        assert assignment is not None
        late = yield Await(assignment.is_settled, self.job.patience.deadline_s)
        if isinstance(late, Lost) or assignment.trained is None:
            raise NodeLost(assignment.failure or f"edge {assignment.edge}: no answer")
        return assignment.trained

    def _message(self, work: _Work, run: TurnRun, presence: Contact) -> Message:
        turn, adapters = run.turn, run.adapters
        task = TurnTask(
            job=replace(self.job, optimizer=work.optimizer or self.job.optimizer),
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
            sent = {name: adapters[name] for name in names}
        node_id = self.roster.by_index(turn.device).node_id
        return task_message(node_id, TRAIN if work.train else EVALUATE, task, sent)


def _all_ended(runs: Sequence[TurnRun]) -> bool:
    return all(run.result is not None for run in runs)
