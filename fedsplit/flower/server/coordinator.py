"""Running a plan over Flower: branches in parallel, the turns of a branch one after the other."""

import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from logging import WARNING

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.execution import weighted_mean
from fedsplit.flower.messages import (
    EVALUATE,
    TRAIN,
    Contact,
    Job,
    TurnTask,
    read_arrays,
    read_error,
    read_metrics,
    task_message,
)
from fedsplit.flower.server.drive import Answer, Await, Call, Fork, Lost, Turns, Waited, drive
from fedsplit.flower.server.edges import RemoteEdges
from fedsplit.flower.server.host import StageHost
from fedsplit.flower.server.liveness import StartClock
from fedsplit.flower.server.outcome import BranchOutcome, TurnOutcome, check_complete, turn_outcome
from fedsplit.flower.server.placement import Seat, Seating
from fedsplit.flower.server.roster import Roster, rediscover
from fedsplit.flower.server.watch import TurnWatch
from fedsplit.models import check_route
from fedsplit.plan import DEVICE, EDGE, Branch, Failure, Route, Turn

_Done = tuple[dict[str, Tensor], TurnOutcome]  # complete adapters, and what the turn did


@dataclass(eq=False)
class _Errand:
    """A turn and what came of it; without `adapters` its device is to get ready and wait."""

    turn: Turn
    adapters_on_link: bool
    adapters: Mapping[str, Tensor] | None = None
    seat: Seat | None = None
    watch: TurnWatch | None = None
    result: _Done | Failure | None = None


def _all_ended(errands: Sequence[_Errand]) -> bool:
    return all(errand.result is not None for errand in errands)


_PHASES = {TRAIN: "train", EVALUATE: "evaluate"}


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
        A turn without an answer this long after its device came is given up.
    on_progress : callable, optional
        Called about once a second with the phase ("train", "evaluate"), the mini-batches done and
        those planned.
    start_s : float, optional
        A node that has not come this long after its task was sent, or not answered so long after
        its process ended, is given up; by default only after `deadline_s`. It includes what Flower
        needs to carry a message and to start a process.
    places : int, optional
        Nodes that can work at once, in a simulation; the others wait, and are not late meanwhile.
    on_failure : callable, optional
        Called with each failure of a device or edge, when it is noticed.
    start_ahead : bool
        Whether the next devices of a branch are started while the present ones train.
    """

    def __init__(
        self,
        grid: Grid,
        host: StageHost,
        job: Job,
        roster: Roster,
        deadline_s: float,
        on_progress: Callable[[str, int, int], None] | None = None,
        start_s: float | None = None,
        places: int | None = None,
        on_failure: Callable[[Failure], None] = lambda failure: None,
        start_ahead: bool = False,
    ) -> None:
        self.job = job
        self.roster = roster
        self._grid = grid
        self._host = host
        self._deadline_s = deadline_s
        self._start_s = min(start_s, deadline_s) if start_s is not None else deadline_s
        self._on_progress = on_progress
        self._possible: set[Route] = set()
        self._on_failure = on_failure
        self._start_ahead = start_ahead
        self._failures: list[Failure] = []
        self._clock = StartClock(host.attendance, self._start_s, places)
        self._edges: RemoteEdges | None = None
        if roster.edges:
            nodes = {edge.index: edge for edge in roster.edges}
            self._edges = RemoteEdges(
                grid, host, job, nodes, self._clock, self._start_s, deadline_s, self._fail
            )
        self._seating = Seating(host, self._edges, job.seed)

    def welcome_back(self) -> None:
        """Take in devices and edges that were started again since; each has its old place."""
        self.roster = rediscover(self._grid, self.job, self.roster, self._start_s)
        if self._edges is not None:
            self._edges.nodes = {edge.index: edge for edge in self.roster.edges}

    def train(
        self, server_round: int, branches: Sequence[Branch], arrays: Mapping[str, Tensor]
    ) -> tuple[tuple[BranchOutcome, ...], tuple[Failure, ...]]:
        """Train every branch from the adapters `arrays`; return them in order, and who failed.

        A device that fails loses its turn: its branch goes on from the adapters before it.
        """
        return self._run(TRAIN, server_round, branches, arrays)

    def evaluate(
        self, server_round: int, turns: Sequence[Turn], arrays: Mapping[str, Tensor]
    ) -> tuple[tuple[TurnOutcome, ...], tuple[Failure, ...]]:
        """Evaluate the adapters `arrays` on the test data of every turn's device."""
        branches = [Branch((turn,)) for turn in turns]
        outcomes, failures = self._run(EVALUATE, server_round, branches, arrays)
        return tuple(turn for outcome in outcomes for turn in outcome.turns), failures

    def _run(
        self,
        kind: str,
        server_round: int,
        branches: Sequence[Branch],
        arrays: Mapping[str, Tensor],
    ) -> tuple[tuple[BranchOutcome, ...], tuple[Failure, ...]]:
        self._refuse_impossible(turn.route for branch in branches for turn in branch.turns)
        self._failures = []
        outcomes: dict[int, BranchOutcome] = {}
        planned = sum(self._steps(kind, turn) for branch in branches for turn in branch.turns)
        report = self._on_progress
        drive(
            self._grid,
            [
                self._branch(server_round, index, branch, arrays, kind, outcomes)
                for index, branch in enumerate(branches)
            ],
            self._tick,
            (lambda done: report(_PHASES[kind], done, planned)) if report else None,
        )
        return tuple(outcomes[index] for index in range(len(branches))), tuple(self._failures)

    def _tick(self) -> None:
        self._clock.tick()
        if self._edges is not None:
            self._edges.tick()

    def _fail(self, failure: Failure) -> None:
        """Keep a failure and pass it on, at once."""
        log(WARNING, "%s failed (%s): %s", failure.who, failure.phase, failure.reason)
        self._failures.append(failure)
        self._on_failure(failure)

    def _refuse_impossible(self, routes: Iterable[Route]) -> None:
        """Raise, before anything is sent, if the model cannot be trained on one of `routes`."""
        for route in set(routes) - self._possible:
            check_route(self.job.model, route)
            self._possible.add(route)

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
    ) -> Turns:
        """Run the waves of a branch, each from what came of the one before.

        At an edge that is a node, adapters stay there in between; if it fails, they are lost, and
        with them all that the branch trained in this round.
        """
        adapters = dict(arrays)
        turns: list[TurnOutcome] = []
        failures: list[Failure] = []
        ahead: list[_Errand] = []
        seats: list[Seat] = []
        try:
            if self._edges is not None and branch.at_edge:
                seats = self._take_seats(server_round, branch, adapters, kind, True)
            for wave, following in zip(branch.waves, (*branch.waves[1:], ()), strict=True):
                for errand in ahead:
                    self._let_begin(errand, adapters)
                fresh = [] if ahead else [_Errand(turn, branch.adapters_on_link) for turn in wave]
                for errand in fresh:
                    errand.adapters = adapters
                    errand.seat = seats[branch.turns.index(errand.turn)] if seats else None
                errands = ahead or fresh
                ahead = [_Errand(turn, True) for turn in self._startable(wave, following)]
                begun = [*fresh, *ahead]
                yield Fork([self._attempt(server_round, errand, kind) for errand in begun])
                yield Await(partial(_all_ended, errands))
                # In the plan's order, whoever came in first.
                results = [errand.result for errand in errands]
                failures += [result for result in results if isinstance(result, Failure)]
                finished = [result for result in results if isinstance(result, tuple)]
                if finished:
                    adapters |= self._mean(finished)
                    turns += [outcome for _, outcome in finished]
                if seats:
                    seats[0].judge([branch.turns.index(outcome.turn) for _, outcome in finished])
            if seats:
                adapters |= yield from self._from_edge(seats[0])
                check_complete(adapters, arrays)
                places = [branch.turns.index(outcome.turn) for outcome in turns]
                turns = [
                    replace(turn, link_bytes={**turn.link_bytes, **seats[place].edge_bytes()})
                    for turn, place in zip(turns, places, strict=True)
                ]
        except FedsplitError as error:
            turns = []
            known = {failure.index for failure in failures}
            lost = [device for device in branch.devices if device not in known]
            failures += [self._lose(device, kind, error) for device in lost]
        finally:
            for seat in seats:
                seat.discard()
        outcomes[index] = BranchOutcome(index, branch, adapters, tuple(turns), tuple(failures))

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

    def _mean(self, finished: Sequence[_Done]) -> dict[str, Tensor]:
        """Return the mean of what turns trained, weighted by their devices' training samples."""
        weights = [self.roster.by_index(outcome.turn.device).n_train for _, outcome in finished]
        return weighted_mean([trained for trained, _ in finished], weights)

    def _attempt(self, server_round: int, errand: _Errand, kind: str) -> Turns:
        """Run one turn; its errand holds what came of it."""
        try:
            errand.result = yield from self._turn(server_round, errand, kind)
        except FedsplitError as error:
            errand.result = self._lose(errand.turn.device, kind, error)
            seat = errand.seat
            if seat is not None and seat.ticket is not None and not seat.stays:
                seat.ticket.judge(())  # its edge need not wait for it
        finally:
            if errand.seat is not None:
                errand.seat.discard()
            if errand.watch is not None:
                self._host.attendance.forget(errand.watch.presence)

    def _lose(self, device: int, kind: str, error: FedsplitError) -> Failure:
        failure = Failure(DEVICE, device, _PHASES[kind], str(error), time.time())
        self._fail(failure)
        return failure

    def _take_seats(
        self,
        server_round: int,
        branch: Branch,
        adapters: Mapping[str, Tensor] | None,
        kind: str,
        adapters_on_link: bool,
    ) -> list[Seat]:
        return self._seating.take(
            server_round,
            branch,
            adapters or {},
            train=kind == TRAIN,
            adapters_on_link=adapters_on_link,
            weights=[self.roster.by_index(turn.device).n_train for turn in branch.turns],
            bounds=[self.job.bounds(self._steps(kind, turn)) for turn in branch.turns],
        )

    def _turn(
        self, server_round: int, errand: _Errand, kind: str
    ) -> Generator[Waited, Answer, _Done]:
        """Run one turn; return what it trained (nothing in evaluation) and what it did.

        Its adapters are complete, but for those that stay at an edge.
        """
        turn = errand.turn
        if errand.seat is None:
            (errand.seat,) = self._take_seats(
                server_round, Branch((turn,)), errand.adapters, kind, errand.adapters_on_link
            )
        seat = errand.seat
        contact = self._host.expect(f"device {turn.device}")
        errand.watch = watch = TurnWatch(
            self._host, self._clock, contact.token, seat, self._start_s, self._deadline_s
        )
        if errand.adapters is not None:
            self._let_begin(errand, errand.adapters)
        message = self._task(server_round, errand, seat, contact, kind)
        reply = yield Call(message, self._steps(kind, turn), watch.steps, watch.trouble)
        if isinstance(reply, Lost):
            raise FedsplitError(reply.reason)
        assert reply is not None
        if reply.has_error():
            raise FedsplitError(read_error(reply))
        if watch.begun_s is None:
            raise FedsplitError("answered before its turn began")
        trained = read_arrays(reply)
        if seat.ticket is not None and not seat.stays:
            trained |= yield from self._from_edge(seat)
        if kind == TRAIN:
            trained |= seat.finish()
            tiers = (DEVICE, EDGE) if seat.stays else ()
            absent = {name for tier in tiers for name in self._host.adapter_names(turn.route, tier)}
            given = errand.adapters or {}
            check_complete(trained, {name: given[name] for name in given if name not in absent})
        backhaul = seat.link_bytes() | seat.edge_bytes()
        return trained, turn_outcome(turn, read_metrics(reply), backhaul, watch.begun_s)

    def _from_edge(self, seat: Seat) -> Generator[Waited, Answer, dict[str, Tensor]]:
        """Return what an edge that is a node answers."""
        ticket = seat.ticket
        assert ticket is not None
        late = yield Await(ticket.is_settled, self._deadline_s)
        if isinstance(late, Lost) or ticket.trained is None:
            raise FedsplitError(ticket.failure or f"edge {ticket.edge}: no answer")
        return ticket.trained

    def _let_begin(self, errand: _Errand, adapters: Mapping[str, Tensor]) -> None:
        """Give a turn its adapters; its device, if it was started ahead, is told to begin."""
        watch, seat, ahead = errand.watch, errand.seat, errand.adapters is None
        if watch is None or seat is None or errand.result is not None:
            return
        errand.adapters = adapters
        seat.supply(adapters)
        watch.begin()
        if ahead:
            words = {"address": seat.address, "token": seat.token}
            self._host.attendance.tell(watch.presence, words)

    def _task(
        self, server_round: int, errand: _Errand, seat: Seat, contact: Contact, kind: str
    ) -> Message:
        turn, adapters = errand.turn, errand.adapters
        task = TurnTask(
            job=self.job,
            contact=contact,
            server_round=server_round,
            device=turn.device,
            route=str(turn.route),
            n_blocks=turn.route.n_blocks,
            steps=turn.steps,
            codec=turn.codec,
            address=seat.address if adapters is not None else "",
            token=seat.token if adapters is not None else "",
            seed=self._seating.seed(server_round, turn),
            adapters_on_link=seat.adapters_on_link,
            repeat=turn.repeat,
            ahead=adapters is None,
        )
        sent: dict[str, Tensor] = {}
        if adapters is not None and not task.adapters_on_link:
            names = self._host.adapter_names(turn.route, DEVICE)
            sent = {name: adapters[name] for name in names}
        return task_message(self.roster.by_index(turn.device).node_id, kind, task, sent)
