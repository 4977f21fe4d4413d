"""Queues against slow simulations that follow their definitions literally."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsplit.fleet import queues
from fedsplit.fleet.queues import Visits, first_come_first_served, processor_sharing
from fedsplit.fleet.relay import Relay


@dataclass
class Wave:
    """Turns that start together: a number for each, and the time around them."""

    branch: int
    turns: list[int]
    before_s: float = 0.0
    after_s: float = 0.0


@dataclass
class Case:
    """Visits, and the waves of turns that make them; turns without visits take `alone_s`."""

    visits: Visits
    waves: list[Wave]
    alone_s: np.ndarray
    trail_s: np.ndarray

    def of(self, turn):
        return np.flatnonzero(self.visits.turn == turn).tolist()

    def relay(self):
        n_turns = len(self.alone_s)
        return Relay(
            [wave.branch for wave in self.waves],
            [wave.turns[0] for wave in self.waves],
            [wave.before_s for wave in self.waves],
            [wave.after_s for wave in self.waves],
            self.alone_s.tolist(),
            self.trail_s.tolist(),
            [min(self.of(turn), default=-1) for turn in range(n_turns)],
        )


@st.composite
def cases(draw, ties=True):
    branches = draw(
        st.lists(  # visits of each turn, by wave
            st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=3),
            min_size=1,
            max_size=3,
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    # Whole numbers make ties common.
    whole = ties and draw(st.booleans())

    def times(*shape):
        return rng.integers(0, 4, shape).astype(float) if whole else rng.uniform(0, 3, shape)

    waves, counts = [], []
    for branch, made_of in enumerate(branches):
        for sizes in made_of:
            first = len(counts)
            counts += sizes
            waves.append(Wave(branch, list(range(first, len(counts))), *times(2)))
    n = sum(counts)
    turn = np.repeat(np.arange(len(counts)), counts)
    visits = Visits(times(n), times(n), rng.integers(0, 2, n), turn)
    return Case(visits, waves, times(len(counts)), times(len(counts)))


def chains(visits, turn):
    """Return a case of turns that all start at 0 and have nothing around them."""
    none = np.zeros(max(turn) + 1)
    waves = [Wave(number, [number]) for number in range(len(none))]
    return Case(Visits(*visits, np.asarray(turn)), waves, none, none)


@dataclass
class Course:
    """What has started and ended by now."""

    case: Case
    start: dict = field(default_factory=dict)
    end: dict = field(default_factory=dict)

    def newly_started(self):
        """Return the turns that can start; ends at once those that visit nobody."""
        found = []
        for before, wave in zip([None, *self.case.waves[:-1]], self.case.waves, strict=True):
            follows = before is not None and before.branch == wave.branch
            if wave.turns[0] in self.start:
                continue
            if follows and not all(turn in self.end for turn in before.turns):
                continue
            since = max(self.end[t] for t in before.turns) + before.after_s if follows else 0.0
            for turn in wave.turns:
                self.start[turn] = since + wave.before_s
                if self.case.of(turn):
                    found.append(turn)
                else:
                    self.end[turn] = self.start[turn] + self.case.alone_s[turn]
        return found

    def arrivals(self):
        """Return the first visits of what can start, and when they arrive."""
        delay = self.case.visits.delay_s
        firsts = [(turn, self.case.of(turn)[0]) for turn in self.newly_started()]
        return {visit: self.start[turn] + delay[visit] for turn, visit in firsts}

    def leave(self, visit, now):
        """End a visit; return the visits that come by that, and when they arrive."""
        visits = self.case.visits
        turn = visits.turn[visit]
        if visit != self.case.of(turn)[-1]:
            return {visit + 1: now + visits.delay_s[visit + 1]}
        self.end[int(turn)] = now + self.case.trail_s[turn]
        return self.arrivals()


def serve_one_by_one(case):
    """Pick again and again the arrived visit that came first, of all servers."""
    course, visits = Course(case), case.visits
    coming = course.arrivals()
    free, end = {0: 0.0, 1: 0.0}, np.zeros(len(visits.delay_s))
    while coming:
        visit = min(coming, key=lambda v: (coming[v], v))
        arrival, node = coming.pop(visit), int(visits.node[visit])
        free[node] = end[visit] = max(free[node], arrival) + visits.work_s[visit]
        coming |= course.leave(visit, end[visit])
    return end, course


def share_literally(case):
    """Move time from event to event; between events, all visits at a server progress at 1/n."""
    course, visits = Course(case), case.visits
    coming = course.arrivals()
    left, end, now = {}, np.zeros(len(visits.delay_s)), 0.0
    while coming or left:
        crowd = [sum(visits.node[v] == node for v in left) for node in (0, 1)]
        finish = {v: now + left[v] * crowd[visits.node[v]] for v in left}
        moment = min([*finish.values(), *coming.values()])
        for v in left:
            left[v] -= (moment - now) / crowd[visits.node[v]]
        now = moment
        for v in [v for v in left if finish[v] <= now + 1e-12]:
            del left[v]
            end[v] = now
            coming |= course.leave(v, now)
        for v in [v for v in coming if coming[v] <= now]:
            del coming[v]
            left[v] = visits.work_s[v]
    return end, course


def check(case, discipline, literally):
    relay = case.relay()
    served = discipline(case.visits, relay)
    end, course = literally(case)
    assert served.end_s == pytest.approx(end)
    turns = range(len(case.alone_s))
    assert relay.start_s == pytest.approx([course.start[turn] for turn in turns])
    assert relay.end_s == pytest.approx([course.end[turn] for turn in turns])
    for wave, done in zip(case.waves, relay.done_s, strict=True):
        assert done == pytest.approx(max(course.end[turn] for turn in wave.turns))
    return served


@settings(max_examples=200, deadline=None)
@given(cases())
def test_first_come_first_served(case):
    served = check(case, first_come_first_served, serve_one_by_one)
    assert np.all(served.begin_s >= served.arrive_s)
    assert served.end_s - served.begin_s == pytest.approx(case.visits.work_s)


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_visits_served_many_at_a_time_end_when_they_would_one_by_one(case):
    """However few: from the first, and until the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queues, "_LEAST_BATCH", 1)
        check(case, first_come_first_served, serve_one_by_one)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), load=st.sampled_from([0.2, 1.0, 5.0]))
def test_many_visits_end_as_few_do(seed, load):
    """Against the same queue with batches that never pay; two servers, some turns follow others."""
    rng = np.random.default_rng(seed)
    n_turns, each = 300, 5
    n = n_turns * each
    work, delay = rng.uniform(0, load, n), rng.uniform(0, 300, n)
    turn = np.repeat(np.arange(n_turns), each)
    waves = [Wave(number // 2, [number]) for number in range(n_turns)]
    none = np.zeros(n_turns)
    case = Case(Visits(delay, work, rng.integers(0, 2, n), turn), waves, none, none)
    found = first_come_first_served(case.visits, case.relay())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queues, "_LEAST_BATCH", n)
        expected = first_come_first_served(case.visits, case.relay())
    assert found.end_s == pytest.approx(expected.end_s, rel=1e-12)


def serve_with_places(case, waits, places):
    """Move time from moment to moment: a lane and a queue for it, places and a queue for them."""
    course, visits = Course(case), case.visits
    coming = course.arrivals()
    lane, lane_queue, place_queue = ({0: [], 1: []} for _ in range(3))
    left, end = {0: places, 1: places}, np.zeros(len(visits.delay_s))
    while coming or any(lane.values()):
        now = min([*coming.values(), *(until for busy in lane.values() for _, until in busy)])
        for node, busy in lane.items():
            for visit, until in [one for one in busy if one[1] <= now]:
                busy.remove((visit, until))
                end[visit] = now
                left[node] += waits[visit] < 0
                coming |= course.leave(visit, now)
        for visit in sorted(v for v in coming if coming[v] <= now):
            del coming[visit]
            queue = place_queue if waits[visit] > 0 else lane_queue
            queue[int(visits.node[visit])].append(visit)
        for node in (0, 1):
            while left[node] and place_queue[node]:
                left[node] -= 1
                lane_queue[node].append(place_queue[node].pop(0))
            if lane_queue[node] and not lane[node]:
                visit = lane_queue[node].pop(0)
                lane[node].append((visit, now + visits.work_s[visit]))
    return end, course


def with_waits(case):
    """Return for each visit whether activations wait after it: pairs on one server, as a step is.

    Between a pair the turn may visit the other server, as an edge's turn does the cloud.
    """
    visits = case.visits
    node, waits = visits.node.copy(), np.zeros(len(visits.node), dtype=int)
    for turn in range(len(case.alone_s)):
        own = case.of(turn)
        if len(own) == 2:
            node[own], waits[own] = node[own[0]], (1, -1)
        elif len(own) == 3:
            node[own], waits[own] = (0, 1, 0), (1, 0, -1)
    return replace(case, visits=replace(visits, node=node, waits=waits)), waits


@settings(max_examples=300, deadline=None)
@given(cases(ties=False), st.integers(1, 3))
def test_turns_that_leave_activations_queue_for_a_place(case, places):
    case, waits = with_waits(case)
    served = check(
        case,
        lambda visits, relay: first_come_first_served(visits, relay, places),
        lambda same: serve_with_places(same, waits, places),
    )
    for node in (0, 1):
        here = case.visits.node == node
        opened = np.sort(served.begin_s[here & (waits > 0)])
        closed = np.sort(served.end_s[here & (waits < 0)])
        for moment in opened:
            assert np.sum(opened <= moment) - np.sum(closed <= moment + 1e-12) <= places


def test_a_server_is_free_while_a_device_computes_its_tail():
    """Four devices of 1 s tails behind a server that needs 0.1 s: little more than one's time."""

    def last_end(turns, places):
        delay = np.tile([0.1, 1.2], turns)  # a way up; down, the tail, and up again
        waits = np.tile([1, -1], turns)
        case = chains((delay, np.full(2 * turns, 0.05), np.zeros(2 * turns, int)), number(turns))
        visits = replace(case.visits, waits=waits)
        return first_come_first_served(visits, case.relay(), places).end_s.max()

    def number(turns):
        return np.repeat(np.arange(turns), 2)

    assert last_end(4, 16) <= 1.3 * last_end(1, 16)
    # Without any room one waits for the other, from forward to backward.
    assert last_end(4, 1) == pytest.approx(0.1 + 4 * 1.3)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_processor_sharing(case):
    served = check(case, processor_sharing, share_literally)
    assert np.all(served.end_s - served.arrive_s >= case.visits.work_s - 1e-9)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_a_server_without_rivals_serves_at_once(case):
    one = case.visits
    assume(len(one.turn) > 0)
    alone = chains((one.delay_s, one.work_s, one.node), np.zeros_like(one.turn))
    expected = np.cumsum(one.delay_s + one.work_s)
    for discipline in (first_come_first_served, processor_sharing):
        assert discipline(alone.visits, alone.relay()).end_s == pytest.approx(expected)


def test_two_equal_visits_to_a_shared_server_take_twice_as_long():
    case = chains((np.zeros(2), np.ones(2), np.zeros(2, dtype=int)), [0, 1])
    assert processor_sharing(case.visits, case.relay()).end_s.tolist() == [2, 2]
    assert first_come_first_served(case.visits, case.relay()).end_s.tolist() == [1, 2]
