"""Random waypoint: a position depends on seed and time only, and legs have the asked-for speed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.wireless.mobility import RandomWaypoint

START = np.random.default_rng(0).uniform(-50, 50, (20, 2))


def walk(pause_s=0.0):
    return RandomWaypoint(START, 100.0, (1.0, 2.0), pause_s, seed=7)


@settings(max_examples=30, deadline=None)
@given(times=st.lists(st.floats(0, 2000), min_size=1, max_size=6))
def test_any_order_of_questions_gives_the_same_walk(times):
    shared = walk()
    for time_s in times:
        assert np.array_equal(shared.positions_m(time_s), walk().positions_m(time_s))


def test_walks_start_where_the_fleet_stands_and_stay_in_the_square():
    path = walk()
    assert np.array_equal(path.positions_m(0.0), START)
    assert all(np.all(np.abs(path.positions_m(t)) <= 50) for t in np.linspace(0, 3000, 50))


def test_speed_never_exceeds_the_fastest_leg_and_reaches_the_slowest_within_one():
    path, times = walk(), np.arange(0, 500, 0.5)
    track = np.array([path.positions_m(t) for t in times])
    speed = np.linalg.norm(np.diff(track, axis=0), axis=2) / 0.5
    assert speed.max() <= 2.0 + 1e-9
    # A turn inside an interval shortens the chord; most intervals have none.
    assert np.quantile(speed, 0.1) >= 1.0 - 1e-9


def test_pauses_stand_still():
    path = walk(pause_s=50.0)
    track = np.array([path.positions_m(t) for t in np.arange(0, 500, 1.0)])
    still = np.linalg.norm(np.diff(track, axis=0), axis=2) < 1e-12
    assert 0.2 < still.mean() < 0.8
