"""Cuts, clocks, powers and bands for energy and delay: near the best of a fine grid, certified."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.planning import (
    CutCosts,
    Devices,
    InfeasibleError,
    ServerClock,
    SplitProblem,
    WeightedProblem,
    plan_weighted,
    shannon_bps,
    split_exactly,
)
from fedsplit.planning.weighted_problem import LEAST_POWER
from fedsplit.seeds import generator

SERVER = ServerClock(100.0, 1e9, 4e9, 2e-26)


def problem(n_devices: int, seed: int, n_cuts: int = 3, **changes: object) -> WeightedProblem:
    """Return a round in which nothing dominates: every part takes about a second and a joule."""
    rng = generator(seed, "weighted")
    device = np.cumsum(rng.uniform(0.2, 1.0, n_cuts)) * 1e10
    costs = CutCosts(
        device_flops=device,
        server_flops=1.5 * device[-1] - device,
        uplink_bits=rng.uniform(0.2, 2.0, n_cuts) * 1e6,
        downlink_bits=rng.uniform(0.2, 2.0, n_cuts) * 1e6,
        adapter_bits=np.linspace(0.0, 3e5, n_cuts),
        memory_bytes=np.linspace(1e6, 2e6, n_cuts),
    )
    clock = rng.uniform(0.5, 2.0, n_devices) * 1e9
    given: dict[str, object] = {
        "costs": costs,
        "devices": Devices(10.0 * clock, steps=rng.integers(1, 4, n_devices)),
        "clock_hz": clock,
        "min_hz": 0.2 * clock,
        "energy_coefficient": 1e-27,
        "power_w": rng.uniform(0.1, 1.0, n_devices),
        "uplink_snr_hz": rng.uniform(0.1, 20.0, n_devices) * 1e6,
        "downlink_efficiency": rng.uniform(1.0, 5.0, n_devices),
        "uplink_hz": 1e6,
        "downlink_hz": 1e6,
        "power_down_w": 1.0,
        "server": SERVER,
        "second_weight": float(rng.choice([0.0, 0.3, 2.0, 10.0])),
        "min_cut": 0,
    }
    return WeightedProblem(**{**given, **changes})  # type: ignore[arg-type]


def cost(p: WeightedProblem, cut, share, clock, power, server_hz: float) -> tuple[float, ...]:
    """Return objective, delay and energy, straight from the formulas of each part."""
    costs, steps = p.costs, np.asarray(p.devices.steps)
    cut, share, clock, power = map(np.asarray, (cut, share, clock, power))
    per_cycle = p.devices.flops_per_s / p.clock_hz
    cycles = steps * costs.device_flops[cut] / per_cycle
    bits = costs.adapter_bits[cut] + steps * costs.uplink_bits[cut]
    back = costs.adapter_bits[cut] + steps * costs.downlink_bits[cut]
    sending = bits / shannon_bps(share * p.uplink_hz, p.uplink_snr_hz * power / p.power_w)
    down = back / (p.downlink_efficiency * share * p.downlink_hz)
    device_j = p.energy_coefficient * clock**2 * cycles + power * sending
    served = steps * costs.server_flops[cut] / p.server.flops_per_cycle
    other_j = p.server.energy_coefficient * server_hz**2 * served + p.power_down_w * share * down
    alone = p.server_share is not None
    side = cycles / clock + sending + down + (served / server_hz / p.server_share if alone else 0)
    delay = side.max() + (0.0 if alone else served.sum() / server_hz)
    counted = p.device_weight @ device_j + p.joule_weight * other_j.sum()
    energy = device_j.sum() + other_j.sum()
    return float(counted + p.second_weight * delay), float(delay), float(energy)


def best_of_a_grid(p: WeightedProblem, points: int = 5) -> float:
    """Return the least objective of two devices over everything that may be chosen."""
    fractions, powers = np.linspace(0.2, 1.0, points), np.geomspace(LEAST_POWER, 1.0, points)
    chosen = product(fractions, fractions, powers, powers)
    best = np.inf
    for f, g, s, t in chosen:
        clock, power = p.clock_hz * [f, g], p.power_w * [s, t]
        for share in np.linspace(0.1, 0.9, 9):
            for cut in product(range(2), repeat=2):
                best = min(best, cost(p, cut, [share, 1 - share], clock, power, SERVER.max_hz)[0])
    return best


@pytest.mark.parametrize("seed", range(3))
def test_nothing_on_a_grid_is_better(seed: int) -> None:
    """Every clock, power, share and cut of two devices; the server's clock is fixed here."""
    changes: dict[str, object] = {"server_share": 0.5, "power_range": LEAST_POWER}
    p = problem(2, seed, n_cuts=2, **changes)
    best, plan = best_of_a_grid(p), plan_weighted(p)
    assert plan.bound <= best * (1 + 1e-9)
    assert plan.objective <= best * 1.01


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**20), st.sampled_from([None, 1.0, 0.25]))
def test_a_plan_costs_what_it_says_and_keeps_its_limits(
    n_devices: int, seed: int, server_share: float | None
) -> None:
    p = problem(n_devices, seed, server_share=server_share)
    plan = plan_weighted(p)
    found = cost(p, plan.cut, plan.share, plan.device_hz, plan.uplink_w, plan.server_hz)
    assert found == pytest.approx((plan.objective, plan.delay_s, plan.energy_j), rel=1e-6)
    assert plan.share.sum() <= 1 + 1e-9
    slack = 1 + 1e-9
    for value, low, high in (
        (plan.device_hz, p.min_hz, p.clock_hz),
        (plan.uplink_w, LEAST_POWER * p.power_w, p.power_w),
    ):
        assert (value <= high * slack).all()
        assert (value >= low / slack).all()
    assert plan.bound <= plan.objective * (1 + 1e-9)


def test_few_plans_are_certified_to_worse_than_two_percent() -> None:
    """Prices of the band cannot tell what whole cuts cost, which few devices do not even out."""
    sizes = [1 + seed % 12 for seed in range(24)]
    gaps = [plan_weighted(problem(n, seed)).gap for seed, n in enumerate(sizes)]
    assert sorted(gaps)[-3] <= 0.02
    assert max(gaps) <= 0.1


@pytest.mark.parametrize("seed", range(10))
def test_it_is_never_worse_than_the_exact_cuts_at_full_speed(seed: int) -> None:
    p = problem(5, seed, n_cuts=6)
    plan = plan_weighted(p)
    share = np.full(5, 0.2)
    best = np.inf
    for cuts in ([c] * 5 for c in range(6)):
        found = cost(p, cuts, share, p.clock_hz, p.power_w, plan.server_hz)
        best = min(best, found[0])
    assert plan.bound <= plan.objective <= best * (1 + 1e-9)


@pytest.mark.parametrize("weight", [0.05, 1.0, 20.0])
def test_the_server_s_clock_is_the_best_of_its_range(weight: float) -> None:
    p = problem(3, 1, second_weight=weight)
    plan = plan_weighted(p)
    others = [
        cost(p, plan.cut, plan.share, plan.device_hz, plan.uplink_w, hz)[0]
        for hz in np.linspace(SERVER.min_hz, SERVER.max_hz, 301)
    ]
    assert plan.objective <= min(others) * (1 + 1e-9)


def test_without_choice_it_is_the_exact_split() -> None:
    """One clock, one power, one device: what is left is where to cut."""
    p = problem(1, 3, n_cuts=8, power_range=1.0, second_weight=1.0)
    p = replace(p, min_hz=p.clock_hz)
    share = np.ones(1)
    rows = [cost(p, [c], share, p.clock_hz, p.power_w, SERVER.max_hz)[1:] for c in range(8)]
    delay, energy = np.array(rows).T[:, None]
    exact = split_exactly(SplitProblem(delay, 0 * delay, 0 * delay, energy, 1.0))
    plan = plan_weighted(replace(p, server_share=1.0))
    assert plan.cut.tolist() == exact.cut.tolist()
    assert plan.objective == pytest.approx(exact.objective, rel=1e-9)


def test_a_dear_device_spends_less_and_the_others_go_on() -> None:
    p = problem(4, 2, second_weight=5.0)
    cheap, dear = (plan_weighted(replace(p, device_weight=[w, 1.0, 1.0, 1.0])) for w in (1.0, 50.0))
    assert dear.device_j[0] < 0.9 * cheap.device_j[0]


def test_infeasible_and_senseless_problems_are_named() -> None:
    with pytest.raises(InfeasibleError, match="memory of device 0"):
        plan_weighted(problem(1, 0, devices=Devices([1e10], memory_bytes=1e3)))
    for name, value in (("uplink_snr_hz", 0.0), ("power_range", 0.0), ("second_weight", np.nan)):
        with pytest.raises(FedsplitError, match=name):
            problem(1, 0, **{name: value})
