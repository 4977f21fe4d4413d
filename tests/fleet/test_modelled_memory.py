"""Modelled memory against SplitLLM's formula and what sharing and queueing change."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.fleet import ServingSpec, timeline
from fedsplit.plan import RoundPlan, Route, Turn
from fedsplit.profiles import SharedWeights
from tests.fleet.fleet_scenarios import N_BLOCKS, random_fleet, random_profile, random_state

BATCH = 8
WEIGHTS = ("parameter_bytes", "adapter_bytes", "optimizer_bytes")
kinds = st.sampled_from(["device only", "u"])
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


@few
@given(seed=st.integers(0, 1000), n=st.integers(1, 6), places=st.integers(1, 4))
def test_a_queue_keeps_as_many_activations_as_it_has_places(seed, n, places):
    """Of the turns that wait; and the workspace of the one that runs."""
    profile = random_profile(seed)
    serving = ServingSpec(waiting_steps=places)
    fleet = replace(random_fleet(seed, n, edges=1), serving=serving)
    size = part(profile, 2, 4)
    for route, node in (
        (Route.u_shaped(N_BLOCKS, 1, 3), 0),
        (Route.three_tier(N_BLOCKS, 1, 3), 1),
    ):
        plan = RoundPlan.parallel(Turn(i, route, 1) for i in range(n))
        kept = BATCH * (min(places, n) * size["activation"] + size["workspace"])
        expected = splitllm(size, n, 1) - n * BATCH * size["activation"] + kept
        assert server_memory(profile, fleet, plan, node) == pytest.approx(expected)


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


@few
@given(seed=st.integers(0, 1000), cuts=st.tuples(st.integers(0, 5), st.integers(0, 5)), kind=kinds)
def test_tied_weights_count_once_where_their_users_share_a_tier(seed, cuts, kind):
    """Memory, traffic and averaging: as of a model whose head brings no weights of its own."""
    plain = random_profile(seed)
    tied = SharedWeights((0, N_BLOCKS + 1), 3e6, 2e5, 4e5)
    more = {name: getattr(tied, name) for name in WEIGHTS}
    grown = replace(
        plain,
        embed=replace(plain.embed, **{n: getattr(plain.embed, n) + v for n, v in more.items()}),
    )
    counted_twice = replace(
        grown,
        head=replace(plain.head, **{n: getattr(plain.head, n) + v for n, v in more.items()}),
        shared=(tied,),
    )
    first, last = sorted(cuts)
    route = {
        "device only": Route.device_only(N_BLOCKS),
        "u": Route.u_shaped(N_BLOCKS, first, last),
    }[kind]
    fleet = random_fleet(seed, 2)
    plan = RoundPlan.parallel(Turn(i, route, 2) for i in range(2))
    found, expected = (
        timeline(plan, profile, fleet, random_state(seed, fleet), BATCH).cost
        for profile in (counted_twice, grown)
    )
    for name in ("device_memory_bytes", "server_memory_bytes", "uplink_bytes", "downlink_bytes"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name))
    assert found.delay_s == pytest.approx(expected.delay_s)
    assert found.server_compute_s == pytest.approx(expected.server_compute_s)


def test_weights_that_blocks_share_count_once_on_a_server():
    plain = random_profile(2)
    tied = SharedWeights((2, 3, 5), 1e6)
    blocks = [
        replace(block, parameter_bytes=block.parameter_bytes + 1e6 * (i + 1 in tied.units))
        for i, block in enumerate(plain.blocks)
    ]
    profile = replace(plain, blocks=tuple(blocks), shared=(tied,))
    fleet = random_fleet(2, 1)
    for cut, copies in ((0, 1), (2, 1), (3, 1), (5, 0)):
        plan = RoundPlan.parallel([Turn(0, Route.two_tier(N_BLOCKS, cut), 1)])
        extra = server_memory(profile, fleet, plan) - server_memory(plain, fleet, plan)
        assert extra == pytest.approx(copies * 1e6)
