"""Running a plan over Flower: branches in parallel, the waves of a branch one after the other."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from logging import WARNING

from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor

from fedsplit.errors import NodeLost
from fedsplit.execution import OptimizerSpec
from fedsplit.execution.aggregate import MEAN, Part, aggregate, aggregation_error
from fedsplit.flower.server.drive import Answer, Await, Fork, Turns, Waited, drive
from fedsplit.flower.server.edges import RemoteEdges
from fedsplit.flower.server.host import StageHost
from fedsplit.flower.server.listener import Listener
from fedsplit.flower.server.liveness import StartClock, Watcher
from fedsplit.flower.server.outcome import (
    ABSURD_NORM,
    BranchOutcome,
    TurnOutcome,
    check_complete,
    check_update,
)
from fedsplit.flower.server.placement import Placement
from fedsplit.flower.server.roster import Joiners, LoginKeys, Roster
from fedsplit.flower.server.spool import Spool
from fedsplit.flower.server.turn_run import TurnRun
from fedsplit.flower.server.turns import TurnRunner, Work
from fedsplit.flower.tasks import Job
from fedsplit.models.ranks import put_back, residuals
from fedsplit.plan import DEVICE, EDGE, AdapterWay, Branch, Failure, Turn


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
    max_update_norm : float
        The longest update that a turn may bring.
    aggregation : str
        How adapters that were trained side by side in a branch become one.
    login_keys : mapping, optional
        Where Flower authenticates nodes, whose place is whose.
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
        max_update_norm: float = ABSURD_NORM,
        aggregation: str = MEAN,
        login_keys: LoginKeys | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.job = job
        self.roster = roster
        self._grid = grid
        self._host = host
        self._listener = listener or Listener()
        self._start_ahead = start_ahead
        self._max_update_norm = max_update_norm
        self._aggregation = aggregation
        self.errors: list[float] = []  # of what was merged within branches, in this round
        self._failures: list[Failure] = []
        self._spool = Spool()
        # So many that no place ever waits for this process; each message under way costs memory,
        # and in Flower's simulation a look at all of them, ten times a second for every node.
        self._in_flight = None if places is None else 2 * places
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
        self._joiners = Joiners(grid, job, len(roster.edges), login_keys, places)
        self._runner = TurnRunner(
            host,
            job=job,
            clock=self._clock,
            max_update_norm=max_update_norm,
            watcher=grid if isinstance(grid, Watcher) else None,
            on_failure=self._fail,
        )
        self._placement = Placement(host, self._edges, job.seed)

    def welcome_back(self) -> None:
        """Take in devices and edges that were started again since; each has its old place."""
        self.roster = self._joiners.seat(self.roster, self._runner.gone)
        self._runner.gone -= self.roster.refused
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
        return self._run(Work(server_round, optimizer or self.job.optimizer), branches, arrays)

    def untrained(self, branches: Sequence[Branch]) -> set[str]:
        """Return the names of adapters that no turn of `branches` trains."""
        frozen = [
            set(self._host.adapter_names(turn.route, DEVICE) if turn.frozen else ())
            for branch in branches
            for turn in branch.turns
        ]
        return set.intersection(*frozen)

    def evaluate(
        self, server_round: int, turns: Sequence[Turn], arrays: Mapping[str, Tensor]
    ) -> tuple[tuple[TurnOutcome, ...], tuple[Failure, ...]]:
        """Evaluate the adapters `arrays` on the test data of every turn's device."""
        branches = [Branch((turn,)) for turn in turns]
        outcomes, failures = self._run(Work(server_round), branches, arrays)
        return tuple(turn for outcome in outcomes for turn in outcome.turns), failures

    def _run(
        self, work: Work, branches: Sequence[Branch], arrays: Mapping[str, Tensor]
    ) -> tuple[tuple[BranchOutcome, ...], tuple[Failure, ...]]:
        self._failures, self._spool, self.errors = [], Spool(), []
        outcomes: dict[int, BranchOutcome] = {}
        planned = sum(
            self._runner.steps(work, turn, self.roster)
            for branch in branches
            for turn in branch.turns
        )
        drive(
            self._grid,
            [
                self._branch(work, index, branch, arrays, outcomes)
                for index, branch in enumerate(branches)
            ],
            self._tick,
            lambda done: self._listener.on_progress(work.phase, done, planned),
            self.job.patience.last_words_s,
            self._in_flight,
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
            self._runner.gone |= {n.node_id for n in self.roster.edges if n.index == failure.index}
        self._listener.on_failure(failure)

    def _branch(
        self,
        work: Work,
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
            failures += [self._runner.lose(work, device, error) for device in lost]
        kept: Mapping[str, Tensor] = arrays
        if work.train and turns:
            kept = self._spool.put(adapters)
        outcomes[index] = BranchOutcome(index, branch, kept, tuple(turns), tuple(failures))

    def _waves(
        self,
        work: Work,
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
            waves = branch.waves
            works = [work.within(number, len(waves)) for number in range(len(waves))]
            for number, (wave, following) in enumerate(zip(waves, (*waves[1:], ()), strict=True)):
                for run in ahead:
                    if run.result is None:
                        run.begin(adapters)
                fresh = [] if ahead else self._start(works[number], wave, adapters, way)
                runs = ahead or fresh
                ahead = [
                    self._place(works[number + 1], turn, AdapterWay.LINK)
                    for turn in self._startable(wave, following)
                ]
                begun = [*fresh, *ahead]
                yield Fork([self._runner.attempt(work, run, self.roster) for run in begun])
                adapters |= yield from self._end_wave(runs, adapters, turns, failures)
        finally:
            for run in ahead:
                run.discard()
        return adapters

    def _start(
        self, work: Work, wave: Sequence[Turn], adapters: Mapping[str, Tensor], way: AdapterWay
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

    def _place(self, work: Work, turn: Turn, way: AdapterWay) -> TurnRun:
        steps = self._runner.steps(work, turn, self.roster)
        return self._placement.one(
            work.server_round, turn, optimizer=work.optimizer, steps=steps, way=way
        )

    def _place_at_edge(
        self, work: Work, branch: Branch, adapters: Mapping[str, Tensor], way: AdapterWay
    ) -> list[TurnRun]:
        return self._placement.at_remote_edge(
            work.server_round,
            branch,
            adapters,
            optimizer=work.optimizer,
            steps=[self._runner.steps(work, turn, self.roster) for turn in branch.turns],
            way=way,
            weights=[self.roster.by_index(turn.device).n_train for turn in branch.turns],
        )

    def _waves_at_edge(
        self,
        work: Work,
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
                yield Fork([self._runner.attempt(work, run, self.roster) for run in wave])
                adapters |= yield from self._end_wave(wave, adapters, turns, failures)
                assignment.judge(run.place for run in wave if isinstance(run.result, tuple))
            adapters |= yield from self._runner.from_edge(runs[0])
        finally:
            for run in runs:
                run.discard()
        check_complete(adapters, arrays)
        check_update(adapters, arrays, self._max_update_norm)
        places = [branch.turns.index(done.turn) for done in turns]
        turns[:] = [
            replace(done, link_bytes={**done.link_bytes, **runs[place].edge_bytes()})
            for done, place in zip(turns, places, strict=True)
        ]
        return adapters

    def _end_wave(
        self,
        runs: Sequence[TurnRun],
        before: Mapping[str, Tensor],
        turns: list[TurnOutcome],
        failures: list[Failure],
    ) -> Generator[Waited, Answer, dict[str, Tensor]]:
        """Wait for the turns of a wave, which began with `before`; return what comes of them."""
        yield Await(partial(_all_ended, runs))
        # In the plan's order, whoever came in first.
        results = [run.result for run in runs]
        failures += [result for result in results if isinstance(result, Failure)]
        finished = [result for result in results if isinstance(result, tuple)]
        if not finished:
            return {}
        turns += [outcome for _, outcome in finished]
        parts = [
            Part(
                adapters=put_back(trained, before) | residuals(before),
                weight=self.roster.by_index(outcome.turn.device).n_train,
                rank=outcome.turn.rank,
            )
            for trained, outcome in finished
        ]
        if len(parts) == 1:
            return dict(parts[0].adapters)
        merged = aggregate(self._aggregation, parts)
        self.errors.append(aggregation_error(parts, merged) or 0.0)
        return merged

    def _startable(self, wave: Sequence[Turn], following: Sequence[Turn]) -> Sequence[Turn]:
        """Return the turns of the `following` wave, if their devices can get ready during `wave`.

        They get their adapters over the link from the server, and have nothing else to do.
        """
        busy = {turn.device for turn in wave}
        if self._start_ahead and all(
            turn.device not in busy
            and not turn.frozen  # what is held of it depends on its adapters
            and len(turn.route.segments) > 1
            and (self._edges is None or not turn.route.on(EDGE))
            for turn in following
        ):
            return following
        return ()


def _all_ended(runs: Sequence[TurnRun]) -> bool:
    return all(run.result is not None for run in runs)
