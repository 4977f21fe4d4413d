"""SFT's timescales: the exact methods equal enumeration, the paper's own come near them."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from fedsplit.errors import FedsplitError
from fedsplit.planning.bandwidth import equal_shares
from fedsplit.planning.costs import Devices
from fedsplit.planning.errors import InfeasibleError
from fedsplit.planning.sft import SftProblem, plan_large_timescale, plan_small_timescale
from fedsplit.planning.sft_alm import plan_large_timescale_alm
from tests.planning.planning_scenarios import codec_table, sft_problem


def _round_s(problem: SftProblem, cut: int, ratio: np.ndarray) -> float:
    return equal_shares(*problem.pools(cut, ratio)).objective_s


def _enumerated_s(problem: SftProblem, cuts, ratios: np.ndarray, losses: np.ndarray) -> float:
    """Return the least delay over all cuts and all combinations of settings."""
    n_devices, best = len(problem.devices), np.inf
    for setting in product(range(len(ratios)), repeat=n_devices):
        loss = problem.shares_of_data @ losses[list(setting)]
        if loss <= problem.max_loss_increase + 1e-12:
            best = min(best, *(_round_s(problem, cut, ratios[list(setting)]) for cut in cuts))
    return best


@pytest.mark.parametrize("equal_blocks", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_large_timescale_equals_enumeration(seed: int, equal_blocks: bool) -> None:
    problem = sft_problem(3, seed, n_blocks=4, n_settings=5, equal_blocks=equal_blocks)
    plan = plan_large_timescale(problem)
    table = problem.table
    expected = _enumerated_s(problem, range(1, 5), table.ratio, table.loss_increase)
    assert plan.round_s == pytest.approx(expected, rel=1e-10)
    assert plan.round_s == pytest.approx(_round_s(problem, plan.cut, plan.ratio), rel=1e-10)
    assert problem.shares_of_data @ plan.table.loss_increase[plan.setting] <= problem.loss_limit


@pytest.mark.parametrize("bounds", [(1, 2), (2, 2), (3, 4)])
def test_cuts_stay_within_their_bounds(bounds: tuple[int, int]) -> None:
    problem = sft_problem(3, 1, n_blocks=4, n_settings=5)
    bounded = replace(problem, min_cut=bounds[0], max_cut=bounds[1])
    plan = plan_large_timescale(bounded)
    table, inside = problem.table, range(bounds[0], bounds[1] + 1)
    expected = _enumerated_s(problem, inside, table.ratio, table.loss_increase)
    assert plan.cut in inside
    assert plan.round_s == pytest.approx(expected, rel=1e-10)
    assert plan_large_timescale_alm(bounded).plan.cut in inside
    with pytest.raises(FedsplitError, match="max_cut=5: must be 1 to 4"):
        replace(problem, max_cut=5)


@pytest.mark.parametrize("seed", range(4))
def test_augmented_lagrangian_equals_a_grid_before_rounding(seed: int) -> None:
    """With equal blocks the relaxed optimum is at a cut of the grid, up to the grid's width."""
    problem = sft_problem(2, seed, n_blocks=4, n_settings=20)
    found = plan_large_timescale_alm(problem)
    hull = problem.table.hull()
    ratios = np.linspace(hull.ratio[0], hull.ratio[-1], 400)
    losses = np.interp(ratios, hull.ratio, hull.loss_increase)
    share = problem.shares_of_data
    allowed = share[0] * losses[:, None] + share[1] * losses <= problem.max_loss_increase
    expected = np.inf
    for cut in 1 + np.flatnonzero(
        problem.costs.memory_bytes[1:] <= np.min(problem.devices.memory_bytes)
    ):
        delays = [equal_shares(*problem.pools(cut, np.full(2, ratio))).delay_s for ratio in ratios]
        first, second = np.transpose(delays)
        longest = np.maximum(first[:, None], second)
        expected = min(expected, longest[allowed].min())
    assert found.violation <= 1e-6
    assert expected * (1 - 0.01) <= found.relaxed_s <= expected * (1 + 1e-4)
    assert found.relaxed_ratio.min() >= hull.ratio[0]
    assert found.relaxed_ratio.max() <= hull.ratio[-1]


@pytest.mark.parametrize("n_devices", [1, 5, 20])
@pytest.mark.parametrize("seed", range(4))
def test_augmented_lagrangian_finds_the_exact_plan_for_equal_blocks(
    n_devices: int, seed: int
) -> None:
    problem = sft_problem(n_devices, seed)
    exact, found = plan_large_timescale(problem), plan_large_timescale_alm(problem).plan
    assert found.round_s == pytest.approx(exact.round_s, rel=1e-9)


def test_augmented_lagrangian_stays_near_for_uneven_blocks() -> None:
    gaps = []
    for seed in range(12):
        problem = sft_problem(6, seed, equal_blocks=False)
        exact, found = plan_large_timescale(problem), plan_large_timescale_alm(problem).plan
        assert found.round_s >= exact.round_s * (1 - 1e-12)
        gaps.append(found.round_s / exact.round_s - 1)
    assert np.median(gaps) <= 1e-9
    assert max(gaps) <= 0.25


@pytest.mark.parametrize("seed", range(4))
def test_small_timescale_beats_equal_shares_and_equals_sqp(seed: int) -> None:
    problem = sft_problem(6, seed)
    plan = plan_large_timescale(problem)
    fading = np.random.default_rng(seed).exponential(1.0, 6)
    faded = replace(problem, uplink_snr_hz=problem.uplink_snr_hz * fading)
    exact = plan_small_timescale(faded, plan.cut, plan.ratio)
    sqp = plan_small_timescale(faded, plan.cut, plan.ratio, method="sqp")
    assert exact.gap <= 1e-10
    assert exact.objective_s <= _round_s(faded, plan.cut, plan.ratio)
    assert sqp.objective_s == pytest.approx(exact.objective_s, rel=1e-6)


def test_a_looser_loss_limit_and_more_memory_never_slow_a_round() -> None:
    delays = [
        plan_large_timescale(sft_problem(8, 3, max_loss_increase=limit)).round_s
        for limit in (0.02, 0.05, 0.1, 0.3)
    ]
    assert delays == sorted(delays, reverse=True)
    problem = sft_problem(8, 3)
    for memory in (6e8, 2e9, 1e10):
        devices = Devices(problem.devices.flops_per_s, memory, problem.devices.steps)
        delays.append(plan_large_timescale(replace(problem, devices=devices)).round_s)
    assert delays[-3:] == sorted(delays[-3:], reverse=True)


@pytest.mark.parametrize("plan", [plan_large_timescale, plan_large_timescale_alm])
def test_infeasible_problems_say_which_limit_and_by_how_much(plan) -> None:
    problem = sft_problem(3, 0)
    devices = Devices(problem.devices.flops_per_s, [1e10, 3e8, 1e10])
    with pytest.raises(InfeasibleError, match=r"memory of device 1 .*off by 2e\+08 bytes"):
        plan(replace(problem, devices=devices))
    table = codec_table(3)
    least = float(table.loss_increase[-1])
    with pytest.raises(InfeasibleError, match="loss increase of the mildest") as caught:
        plan(replace(problem, table=table, max_loss_increase=least / 2))
    assert caught.value.shortfall == pytest.approx(least / 2)
    with pytest.raises(InfeasibleError, match=r"uplink_hz\[0\]=0, .* has 0 bit"):
        replace(problem, uplink_hz=0.0)
    with pytest.raises(InfeasibleError, match=r"uplink_snr_hz\[1\]=0, .* has 0 bit"):
        replace(problem, uplink_snr_hz=[1e7, 0.0, 1e7])


def test_bad_input_is_refused_by_name() -> None:
    problem = sft_problem(3, 0)
    for name in ("uplink_snr_hz", "downlink_efficiency", "server_flops_per_s", "data_weights"):
        with pytest.raises(FedsplitError, match=name):
            replace(problem, **{name: [1.0, np.nan, 1.0]})
    with pytest.raises(FedsplitError, match="max_loss_increase"):
        replace(problem, max_loss_increase=-0.1)
    with pytest.raises(FedsplitError, match="uplink_hz"):
        replace(problem, uplink_hz=-1.0)
    with pytest.raises(FedsplitError, match="data_weights"):
        replace(problem, data_weights=0.0)
    with pytest.raises(FedsplitError, match="method"):
        plan_small_timescale(problem, 1, np.full(3, 0.1), method="newton")
