"""Modelled memory against SplitLLM's formula and what sharing and queueing change."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.fleet import ServingSpec, timeline
from fedsplit.plan import RoundPlan, Route, Turn
from tests.fleet.fleet_scenarios import N_BLOCKS, random_fleet, random_profile, random_state

BATCH = 8
few = settings(max_examples=30, deadline=None)


def server_memory(profile, fleet, plan, node=0):
    state = random_state(0, fleet)
    return timeline(plan, profile, fleet, state, BATCH).cost.server_memory_bytes[node]


def part(profile, first, last):
    units = [profile.embed, *profile.blocks, profile.head][first:last]
    sizes = {
        name: sum(getattr(unit, f"{name}_bytes") for unit in units)
        for name in ("parameter", "activation", "adapter", "optimizer")
    }
    return {**sizes, "workspace": max((unit.workspace_bytes for unit in units), default=0.0)}


def splitllm(size, concurrent, copies):
    """Papers' section 1 (b): W copies + n_conc (A b + |R| (1 weight + 1 gradient) + o).

    What a unit needs while it computes is no part of the formula; tests add it.
    """
    trained = 2 * size["adapter"] + size["optimizer"]
    frozen = size["parameter"] - size["adapter"]
    return frozen * copies + concurrent * (BATCH * size["activation"] + trained)


@few
@given(
    seed=st.integers(0, 1000),
    cut=st.integers(0, N_BLOCKS),
    n=st.integers(1, 6),
    private=st.booleans(),
)
def test_concurrent_branches_follow_the_formula(seed, cut, n, private):
    profile = random_profile(seed)
    fleet = replace(random_fleet(seed, n), serving=ServingSpec("sharing", private))
    plan = RoundPlan.parallel(Turn(i, Route.two_tier(N_BLOCKS, cut), 1) for i in range(n))
    size = part(profile, cut + 1, None)
    expected = splitllm(size, n, n if private else 1) + n * BATCH * size["workspace"]
    assert server_memory(profile, fleet, plan) == pytest.approx(expected)


@few
@given(seed=st.integers(0, 1000), cut=st.integers(0, N_BLOCKS), n=st.integers(2, 6))
def test_a_queue_holds_activations_once(seed, cut, n):
    profile, fleet = random_profile(seed), random_fleet(seed, n)
    plan = RoundPlan.parallel(Turn(i, Route.two_tier(N_BLOCKS, cut), 1) for i in range(n))
    size = part(profile, cut + 1, None)
    expected = splitllm(size, n, 1) - (n - 1) * BATCH * size["activation"]
    expected += BATCH * size["workspace"]
    assert server_memory(profile, fleet, plan) == pytest.approx(expected)


@few
@given(seed=st.integers(0, 1000), n=st.integers(2, 5))
def test_waiting_for_gradients_keeps_activations_alive_in_a_queue(seed, n):
    """Edges of three tiers and the middle of a U hold them until the gradient comes back."""
    profile, fleet = random_profile(seed), random_fleet(seed, n, edges=1)
    three = RoundPlan.parallel(Turn(i, Route.three_tier(N_BLOCKS, 1, 3), 1) for i in range(n))
    size = part(profile, 2, 4)
    expected = splitllm(size, n, 1) + BATCH * size["workspace"]
    assert server_memory(profile, fleet, three, node=1) == pytest.approx(expected)
    u_shape = RoundPlan.parallel(Turn(i, Route.u_shaped(N_BLOCKS, 1, 3), 1) for i in range(n))
    assert server_memory(profile, fleet, u_shape) == pytest.approx(expected)


def test_sequential_devices_need_one_branch_of_memory_and_all_blocks_they_use():
    profile, fleet = random_profile(0), random_fleet(0, 2)
    turns = [Turn(0, Route.two_tier(N_BLOCKS, 3), 1), Turn(1, Route.two_tier(N_BLOCKS, 1), 1)]
    size = part(profile, 2, None)
    expected = splitllm(size, 1, 1) + BATCH * size["workspace"]
    assert server_memory(profile, fleet, RoundPlan.sequential(turns)) == pytest.approx(expected)


@few
@given(seed=st.integers(0, 1000), cuts=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_device_memory_is_that_of_its_segments(seed, cuts):
    profile, fleet = random_profile(seed), random_fleet(seed, 3)
    first, last = sorted(cuts)
    plan = RoundPlan.sequential([Turn(1, Route.u_shaped(N_BLOCKS, first, last), 1)])
    cost = timeline(plan, profile, fleet, random_state(0, fleet), BATCH).cost
    head, tail = part(profile, 0, first + 1), part(profile, last + 1, None)
    expected = splitllm(head, 1, 1) + splitllm(tail, 1, 1)
    expected += BATCH * max(head["workspace"], tail["workspace"])
    assert cost.device_memory_bytes == pytest.approx([0, expected, 0])


def test_fewer_concurrent_branches_cut_the_servers_peak_by_their_ratio():
    """20 users on 5 edges against 20 copies at once: SplitLLM's claim, as papers' section 1 (f)."""
    profile = random_profile(1)
    route = Route.two_tier(N_BLOCKS, 2)
    copies = ServingSpec("sharing", private_backbones=True)
    fleet = replace(random_fleet(1, 20), serving=copies)
    everyone, five = (
        server_memory(profile, fleet, RoundPlan.parallel(Turn(i, route, 1) for i in range(count)))
        for count in (20, 5)
    )
    assert 1 - five / everyone == pytest.approx(0.75)


@few
@given(seed=st.integers(0, 1000), n=st.integers(2, 6), times=st.integers(1, 3))
def test_an_edge_holds_a_wave_at_a_time_and_what_it_averages(seed, n, times):
    """The turns of a wave as branches at once, and the trained adapters of their devices."""
    profile = random_profile(seed)
    fleet = replace(random_fleet(seed, n, edges=2), serving=ServingSpec("sharing"))
    turns = [Turn(i, Route.three_tier(N_BLOCKS, 1, 3), 1, edge=0) for i in range(n)]
    plan = RoundPlan.hierarchical([turns], times)
    size = part(profile, 2, 4)
    expected = splitllm(size, n, 1) + n * BATCH * size["workspace"]
    handed_up = n * part(profile, 0, 2)["adapter"]
    assert server_memory(profile, fleet, plan, node=1) == pytest.approx(expected + handed_up)
    flat = RoundPlan.parallel(turns)
    assert server_memory(profile, fleet, plan) == pytest.approx(server_memory(profile, fleet, flat))
