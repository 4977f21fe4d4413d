"""Queues against slow simulations that follow their definitions literally."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.fleet.queues import Visits, first_come_first_served, processor_sharing


@st.composite
def visits(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    n = sum(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    # Whole numbers make ties common.
    whole = draw(st.booleans())
    times = rng.integers(0, 4, (2, n)).astype(float) if whole else rng.uniform(0, 3, (2, n))
    return Visits(
        times[0], times[1], rng.integers(0, 2, n), np.repeat(np.arange(len(sizes)), sizes)
    )


def next_visit(visits, visit):
    after = visit + 1
    same = after < len(visits.branch) and visits.branch[after] == visits.branch[visit]
    return after if same else None


def serve_one_by_one(visits):
    """Pick again and again the arrived visit that came first, of all servers."""
    coming = {first: visits.delay_s[first] for first in visits.firsts()}
    free, end = {0: 0.0, 1: 0.0}, np.zeros(len(visits.delay_s))
    while coming:
        visit = min(coming, key=lambda v: (coming[v], v))
        arrival, node = coming.pop(visit), int(visits.node[visit])
        free[node] = end[visit] = max(free[node], arrival) + visits.work_s[visit]
        after = next_visit(visits, visit)
        if after is not None:
            coming[after] = end[visit] + visits.delay_s[after]
    return end


def share_literally(visits):
    """Move time from event to event; between events, all visits at a server progress at 1/n."""
    coming = {first: visits.delay_s[first] for first in visits.firsts()}
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
            after = next_visit(visits, v)
            if after is not None:
                coming[after] = now + visits.delay_s[after]
        for v in [v for v in coming if coming[v] <= now]:
            del coming[v]
            left[v] = visits.work_s[v]
    return end


@settings(max_examples=200, deadline=None)
@given(visits())
def test_first_come_first_served(case):
    served = first_come_first_served(case)
    assert served.end_s == pytest.approx(serve_one_by_one(case))
    assert np.all(served.begin_s >= served.arrive_s)
    assert served.end_s - served.begin_s == pytest.approx(case.work_s)


@settings(max_examples=200, deadline=None)
@given(visits())
def test_processor_sharing(case):
    served = processor_sharing(case)
    assert served.end_s == pytest.approx(share_literally(case))
    assert np.all(served.end_s - served.arrive_s >= case.work_s - 1e-9)


@settings(max_examples=50, deadline=None)
@given(visits())
def test_a_server_without_rivals_serves_at_once(case):
    alone = Visits(case.delay_s, case.work_s, case.node, np.zeros_like(case.branch))
    expected = np.cumsum(case.delay_s + case.work_s)
    for discipline in (first_come_first_served, processor_sharing):
        assert discipline(alone).end_s == pytest.approx(expected)


def test_two_equal_visits_to_a_shared_server_take_twice_as_long():
    case = Visits(np.zeros(2), np.ones(2), np.zeros(2, dtype=int), np.arange(2))
    assert processor_sharing(case).end_s.tolist() == [2, 2]
    assert first_come_first_served(case).end_s.tolist() == [1, 2]
