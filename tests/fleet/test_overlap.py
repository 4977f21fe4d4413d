"""Mini-batches under way at once on the modelled system."""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.fleet import timeline
from fedsplit.pace import Pace
from fedsplit.plan import RoundPlan, Route, Turn
from fedsplit.planning.costs import CutCosts
from tests.fleet.fleet_scenarios import N_BLOCKS, random_fleet, random_profile, random_state, rounds

BATCH = 8
few = settings(max_examples=30, deadline=None)


def one_turn(seed, steps, pace, slow):
    """Return the timeline of one device's turn; its device is `slow` times as slow."""
    profile = replace(random_profile(seed), pace=pace)
    fleet = random_fleet(seed, 1)
    fleet = replace(fleet, devices=replace(fleet.devices, clock_hz=fleet.devices.clock_hz / slow))
    plan = RoundPlan.sequential([Turn(0, Route.two_tier(N_BLOCKS, 2), steps)])
    return timeline(plan, profile, fleet, random_state(seed, fleet), BATCH)


def expected_ends(seconds, steps, pace):
    """Return when each stage of each step ends: after what it needs, and what it queues behind.

    Stages are forward, up, server, down, backward; the device's order is written down here.
    """
    order = []
    for first in range(0, steps, pace.update):
        update = list(range(first, min(first + pace.update, steps)))
        ahead = update[: pace.at_once - 1]
        order += [(0, step) for step in ahead]
        for ahead_step, step in zip(update[pace.at_once - 1 :], update, strict=False):
            order += [(0, ahead_step), (4, step)]
        order += [(4, step) for step in update[max(len(update) - len(ahead), 0) :]]
    before = dict(pairwise([None, *order][::-1]))
    ends = {}
    todo = [(stage, step) for step in range(steps) for stage in range(5)]
    while todo:
        for which in list(todo):
            stage, step = which
            needs = [(stage - 1, step)] if stage else []
            needs += [before[which]] if stage in (0, 4) else [(stage, step - 1)]
            needs = [need for need in needs if need is not None and need[1] >= 0]
            if all(need in ends for need in needs):
                ends[which] = max([ends[n] for n in needs], default=0.0) + seconds[stage]
                todo.remove(which)
    return ends


@few
@given(
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([1e-2, 0.3, 1.0, 3.0, 1e2]),
)
def test_a_turn_is_what_follows_from_what_needs_what(seed, steps, update, at_once, slow):
    pace = Pace(update, min(at_once, update))
    serial, ahead = (one_turn(seed, steps, each, slow) for each in (Pace(), pace))
    of_steps = [one for one in serial.activities(detail=True) if one.step == 0]
    seconds = [one.end_s - one.start_s for one in of_steps]
    expected = expected_ends(seconds, steps, pace)
    begun = of_steps[0].start_s
    found = defaultdict(list)
    for one in ahead.activities(detail=True):
        if one.step >= 0:
            found[one.step].append(one.end_s - begun)
    for (stage, step), end in expected.items():
        assert found[step][stage] == pytest.approx(end, rel=1e-9), (stage, step)
    gained = serial.cost.delay_s - ahead.cost.delay_s
    assert gained == pytest.approx(
        steps * sum(seconds) - max(expected.values()), rel=1e-6, abs=1e-9
    )


@few
@given(rounds(), st.integers(2, 4), st.integers(2, 3))
def test_only_times_change_and_nobody_does_two_things_at_once(scenario, update, at_once):
    plan, profile, fleet, state = scenario
    pace = Pace(update, min(update, at_once))
    serial = timeline(plan, profile, fleet, state, BATCH)
    ahead = timeline(plan, replace(profile, pace=pace), fleet, state, BATCH)
    assert ahead.n_activities == serial.n_activities
    for name in ("device_compute_s", "uplink_s", "server_compute_j", "uplink_bytes"):
        np.testing.assert_allclose(getattr(ahead.cost, name), getattr(serial.cost, name))
    assert (ahead.cost.device_memory_bytes >= serial.cost.device_memory_bytes).all()
    if len(plan.branches) == 1:
        assert ahead.cost.delay_s <= serial.cost.delay_s * (1 + 1e-9)
    of_whom = defaultdict(list)
    shares = fleet.serving.discipline != "fifo"
    for one in ahead.activities(detail=True):
        if not (shares and one.kind == "compute" and not one.entity.startswith("device")):
            kind = one.kind if one.kind != "backhaul" else f"{one.turn} {one.label}"
            of_whom[one.entity, kind, one.branch, one.member].append((one.start_s, one.end_s))
    slack = 1e-9 * ahead.cost.delay_s
    for spans in of_whom.values():
        for (_, end), (start, _) in pairwise(sorted(spans)):
            assert start >= end - slack
    spans = defaultdict(lambda: [np.inf, 0.0])
    for one in ahead.activities(detail=True):
        span = spans[one.entity, one.kind, one.branch, one.turn, one.member]
        span[:] = min(span[0], one.start_s), max(span[1], one.end_s)
    for one in (one for one in ahead.activities() if one.turn >= 0):
        found = spans[one.entity, one.kind, one.branch, one.turn, one.member]
        assert one.start_s == pytest.approx(found[0], abs=slack)
        assert one.end_s <= found[1] + slack


def test_a_device_keeps_the_activations_of_all_that_is_under_way():
    """In what a round costs, and in what a scheme that plans within memory reads."""
    profile = random_profile(3)
    ahead = replace(profile, pace=Pace(4, 3))
    kept = BATCH * sum(unit.activation_bytes for unit in profile.units[:3])
    peaks = [one_turn(3, 4, pace, 1.0).cost.device_memory_bytes[0] for pace in (Pace(), Pace(4, 3))]
    assert peaks[1] - peaks[0] == pytest.approx(2 * kept)
    one, three = (CutCosts.from_profile(each, BATCH).memory_bytes[2] for each in (profile, ahead))
    assert three - one == pytest.approx(2 * kept)
    whole = [
        CutCosts.from_profile(each, BATCH, device_only=True).memory_bytes[-1]
        for each in (profile, ahead)
    ]
    assert whole[0] == whole[1]
