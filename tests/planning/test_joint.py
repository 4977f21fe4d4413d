"""The joint plan is near the best of all combinations, and never below its bound."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.planning.bandwidth import evaluate_shares, minmax_shares
from fedsplit.planning.costs import Devices
from fedsplit.planning.errors import InfeasibleError
from fedsplit.planning.joint import _Options, plan_joint
from fedsplit.planning.pools import LinearPool, ShannonPool
from fedsplit.planning.sft import SftProblem, plan_large_timescale, plan_small_timescale
from fedsplit.planning.ways import Way
from tests.planning.planning_scenarios import sft_problem


def _pools(problem: SftProblem, cut: np.ndarray, ratio: np.ndarray):
    """Return what a round with these cuts and ratios needs of the bands and the server."""
    costs, steps = problem.costs, problem.devices.steps
    up = costs.adapter_bits[cut] + steps * costs.uplink_bits[cut] * ratio
    back = ratio if problem.compress_gradients else 1.0
    down = costs.adapter_bits[cut] + steps * costs.downlink_bits[cut] * back
    return [
        ShannonPool(up, problem.uplink_snr_hz, problem.uplink_hz),
        LinearPool(down / problem.downlink_efficiency, problem.downlink_hz),
        LinearPool(steps * costs.server_flops[cut], np.sum(problem.server_flops_per_s)),
    ], steps * costs.device_flops[cut] / problem.devices.flops_per_s


@pytest.mark.parametrize("equal_blocks", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_near_the_best_of_all_combinations(seed: int, equal_blocks: bool) -> None:
    problem = sft_problem(3, seed, n_blocks=3, n_settings=3, equal_blocks=equal_blocks)
    table = problem.table
    best = np.inf
    for setting in product(range(3), repeat=3):
        if problem.shares_of_data @ table.loss_increase[list(setting)] > problem.loss_limit:
            continue
        for cut in product(range(1, 4), repeat=3):
            pools, fixed = _pools(problem, np.array(cut), table.ratio[list(setting)])
            best = min(best, minmax_shares(pools, fixed).objective_s)
    plan = plan_joint(problem)
    assert plan.bound_s <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= plan.round_s <= best * 1.01


@settings(max_examples=12)
@given(st.integers(1, 40), st.integers(0, 2**20), st.booleans())
def test_the_plan_is_feasible_and_beats_a_common_cut(
    n_devices: int, seed: int, equal_blocks: bool
) -> None:
    problem = sft_problem(n_devices, seed, equal_blocks=equal_blocks)
    plan = plan_joint(problem, iterations=6, trials=5)
    assert (problem.costs.memory_bytes[plan.cut] <= problem.devices.memory_bytes).all()
    assert plan.cut.min() >= 1
    loss = problem.shares_of_data @ plan.table.loss_increase[plan.setting]
    assert loss <= problem.loss_limit
    pools, fixed = _pools(problem, plan.cut, plan.ratio)
    shares = (plan.uplink_hz, plan.downlink_hz, plan.server_flops_per_s)
    for pool, share in zip(pools, shares, strict=True):
        assert share.sum() <= pool.budget * (1 + 1e-12)
    reached = evaluate_shares(pools, shares, fixed)
    np.testing.assert_allclose(plan.delay_s, reached.delay_s, rtol=1e-9)
    assert plan.round_s == pytest.approx(reached.objective_s)
    assert plan.bound_s <= plan.round_s
    common = plan_large_timescale(problem)
    spectrum_only = plan_small_timescale(problem, common.cut, common.ratio)
    assert plan.round_s <= spectrum_only.objective_s * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_loss_costs_no_more_than_it_takes_to_keep_the_limit(seed: int, scale: float) -> None:
    """Whatever the unit of costs: a price a little lower would break the limit."""
    problem = sft_problem(8, seed)
    options = _Options(problem, problem.table, True, [Way(costs=problem.costs)])
    costs = scale * options.priced(np.ones(11))
    chosen, price = options.answer(costs)
    assert options.loss_of(chosen) <= options.loss_limit
    if price == 0:
        assert (chosen == costs.argmin(axis=1)).all()
        return
    harm = problem.shares_of_data[:, None] * options._loss
    cheaper = (costs + 0.999 * price * harm).argmin(axis=1)
    assert options.loss_of(cheaper) > options.loss_limit


def test_certified_gaps_are_small_and_shrink_with_the_fleet() -> None:
    gaps = {n: [plan_joint(sft_problem(n, seed)).gap for seed in range(5)] for n in (4, 60)}
    assert max(gaps[4]) <= 0.1
    assert max(gaps[60]) <= 0.02


def test_no_round_is_faster_than_the_bound_on_any_means() -> None:
    """A looser problem has a lower bound: more band, memory or loss cannot raise it by much."""
    problem = sft_problem(10, 5)
    plan = plan_joint(problem)
    wider = plan_joint(replace(problem, uplink_hz=2 * problem.uplink_hz))
    assert wider.bound_s <= plan.round_s
    assert wider.round_s < plan.round_s


def test_infeasible_problems_name_the_limit() -> None:
    problem = sft_problem(3, 0)
    with pytest.raises(InfeasibleError, match="memory of device 2"):
        plan_joint(
            replace(problem, devices=Devices(problem.devices.flops_per_s, [1e10, 1e10, 1e8]))
        )
    with pytest.raises(InfeasibleError, match="loss increase"):
        plan_joint(replace(problem, max_loss_increase=0.0))


def ways_of(problem: SftProblem, seed: int) -> list[Way]:
    """Return all of it, half of the adapters, and devices that only infer."""
    rng, costs = np.random.default_rng([seed, 1]), problem.costs
    harm = rng.uniform(0, 0.08, costs.n_blocks + 1)
    half = replace(
        costs,
        adapter_bits=costs.adapter_bits / 2,
        memory_bytes=costs.memory_bytes * rng.uniform(0.7, 1),
    )
    still = replace(
        costs,
        device_flops=costs.device_flops / 3,
        downlink_bits=np.zeros_like(costs.downlink_bits),
        memory_bytes=costs.memory_bytes * rng.uniform(0.3, 0.7),
        possible=np.arange(costs.n_blocks + 1) < costs.n_blocks,
    )
    fresh = rng.uniform(0.3, 1, len(problem.devices))
    return [
        Way(costs=costs),
        Way(costs=half, loss_increase=rng.uniform(0, 0.1), rank=2),
        Way(costs=still, loss_increase=harm, frozen=True, fresh=fresh),
    ]


def best_of_all(problem: SftProblem, ways: list[Way], divide_server: bool) -> float:
    """Return the least delay of a round over all choices, each divided exactly; inf for none."""
    table, devices = problem.table, problem.devices
    n_cuts, shares = problem.costs.n_blocks + 1, problem.shares_of_data
    own_hz = np.broadcast_to(problem.server_flops_per_s, len(devices))

    def option(device: int, way: Way, cut: int, setting: int) -> tuple[float, ...] | None:
        costs, ratio = way.costs, table.ratio[setting]
        allowed = costs.possible is None or costs.possible[cut]
        memory = np.broadcast_to(devices.memory_bytes, len(devices))[device]
        if cut < problem.min_cut or not allowed or costs.memory_bytes[cut] > memory:
            return None
        steps = float(np.broadcast_to(devices.steps, len(devices))[device])
        shown = steps * float(np.broadcast_to(way.fresh, len(devices))[device])
        back = ratio if problem.compress_gradients else 1.0
        up = shown * costs.uplink_bits[cut] * ratio + (not way.frozen) * costs.adapter_bits[cut]
        down = costs.adapter_bits[cut] + steps * costs.downlink_bits[cut] * back
        fixed = shown * costs.device_flops[cut] / devices.flops_per_s[device]
        work = steps * costs.server_flops[cut]
        if not divide_server:
            fixed, work = fixed + work / own_hz[device], 0.0
        by_cut = np.broadcast_to(way.loss_increase, n_cuts)[cut]
        return up, down, work, fixed, shares[device] * (by_cut + table.loss_increase[setting])

    choices = [
        [
            found
            for way in ways
            for cut in range(n_cuts)
            for setting in range(len(table))
            if (found := option(device, way, cut, setting)) is not None
        ]
        for device in range(len(devices))
    ]
    best = np.inf
    for plan in product(*choices):
        up, down, work, fixed, loss = (np.array(column) for column in zip(*plan, strict=True))
        # What takes longer with everything to itself need not be divided.
        if loss.sum() > problem.loss_limit or fixed.max() >= best:
            continue
        pools = [
            ShannonPool(up, problem.uplink_snr_hz, problem.uplink_hz),
            LinearPool(down / problem.downlink_efficiency, problem.downlink_hz),
            LinearPool(work, float(own_hz.sum())),
        ]
        best = min(best, minmax_shares(pools, fixed).objective_s)
    return best


def check_exact(seed: int) -> None:
    rng = np.random.default_rng([seed, 2])
    problem = sft_problem(
        2 + seed % 2,
        seed,
        n_blocks=2,
        n_settings=2 - seed % 2,
        equal_blocks=bool(seed % 3),
        max_loss_increase=rng.uniform(0.02, 0.4),
    )
    problem = replace(
        problem,
        devices=replace(
            problem.devices, memory_bytes=rng.uniform(0.3e9, 1.2e9, len(problem.devices))
        ),
    )
    ways, divide = ways_of(problem, seed), seed % 5 > 0
    best = best_of_all(problem, ways, divide)
    if best == np.inf:
        with pytest.raises(InfeasibleError):
            plan_joint(problem, ways, divide_server=divide, search=10_000)
        return
    plan = plan_joint(problem, ways, divide_server=divide, search=10_000)
    assert plan.round_s == pytest.approx(best, rel=1e-9)
    assert plan.bound_s == pytest.approx(best, rel=1e-9)
    for device, (way, cut) in enumerate(zip(plan.way, plan.cut, strict=True)):
        needed = ways[way].costs.memory_bytes[cut]
        assert needed <= np.asarray(problem.devices.memory_bytes)[device]


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_ways_to_train_are_chosen_exactly(first: int) -> None:
    """Cut, codec, rank, frozen or not, bands and server within memory and loss: all tried."""
    for seed in range(first, first + 20):
        check_exact(seed)


@pytest.mark.slow
def test_ways_to_train_are_chosen_exactly_in_many_cases() -> None:
    for seed in range(1_000, 1_300):
        check_exact(seed)


def test_a_search_that_ends_early_says_how_far_it_came() -> None:
    problem = sft_problem(6, 3, n_blocks=3)
    ways = ways_of(problem, 3)
    plans = [plan_joint(problem, ways, search=most) for most in (0, 20, 200)]
    assert all(plan.bound_s <= plans[-1].round_s * (1 + 1e-9) for plan in plans)
    assert plans[0].round_s >= plans[1].round_s >= plans[2].round_s
    assert plans[0].bound_s <= plans[1].bound_s <= plans[2].bound_s


def test_memory_that_no_way_fits_is_named() -> None:
    problem = sft_problem(3, 0)
    tight = replace(problem, devices=replace(problem.devices, memory_bytes=[1e10, 1e7, 1e10]))
    with pytest.raises(InfeasibleError, match="memory of device 1 in any way to train"):
        plan_joint(tight, ways_of(problem, 0))
