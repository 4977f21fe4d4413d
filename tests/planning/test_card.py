"""CARD's closed form is the best of a fine grid of clocks and all cuts."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.planning.card import ServerClock, plan_card
from fedsplit.planning.costs import CutCosts, Devices
from fedsplit.planning.errors import InfeasibleError

SERVER = ServerClock(2 * 4352, 0.3e9, 2.535e9, 160 / 2.535e9**3)


def _scenario(seed: int, n_devices: int, n_blocks: int, *, equal: bool = False):
    rng = np.random.default_rng(seed)
    block = np.full(n_blocks, 1.0) if equal else rng.uniform(0.2, 3.0, n_blocks)
    flops = 3 * 0.1216e9 * 2048 * np.concatenate([[0.01], block])
    bits = 8.4e6 * 8 * (np.ones(n_blocks + 1) if equal else rng.uniform(0.3, 2.0, n_blocks + 1))
    adapters = np.arange(n_blocks + 1) * 5e6
    costs = CutCosts(
        device_flops=np.cumsum(flops),
        server_flops=flops.sum() - np.cumsum(flops),
        uplink_bits=bits,
        downlink_bits=bits,
        adapter_bits=adapters,
        memory_bytes=1e9 + 5e8 * np.arange(n_blocks + 1),
    )
    devices = Devices(rng.uniform(0.5, 5.3, n_devices) * 1e12, steps=50)
    rates = 15e6 * np.log2(1 + 10 ** rng.uniform(0.5, 2.5, (2, n_devices)))
    return costs, devices, rates[0], rates[1]


def _delay_and_energy(costs, devices, up, down, device: int, cut: int, clock_hz):
    speed = SERVER.flops_per_cycle * clock_hz
    delay = costs.adapter_bits[cut] * (1 / up[device] + 1 / down[device]) + 50 * (
        costs.device_flops[cut] / devices.flops_per_s[device]
        + costs.uplink_bits[cut] / up[device]
        + costs.server_flops[cut] / speed
        + costs.downlink_bits[cut] / down[device]
    )
    power = SERVER.energy_coefficient * clock_hz**3
    return delay, power * 50 * costs.server_flops[cut] / speed


def _grid(scenario, device: int, cuts, n_clocks: int):
    clocks = np.geomspace(SERVER.min_hz, SERVER.max_hz, n_clocks)
    pairs = [_delay_and_energy(*scenario, device, cut, clocks) for cut in cuts]
    delay, energy = (np.array(values) for values in zip(*pairs, strict=True))
    used = energy[:, 0] > 0
    return delay, energy, (delay.min(), delay.max()), (energy[used].min(), energy.max())


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.floats(0.02, 0.98), st.integers(0, 2))
def test_each_device_gets_the_best_of_a_fine_grid(seed: int, weight: float, min_cut: int) -> None:
    scenario = _scenario(seed, 3, 6)
    plan = plan_card(*scenario, SERVER, delay_weight=weight, min_cut=min_cut)
    for device in range(3):
        delay, energy, d, e = _grid(scenario, device, range(min_cut, 7), 4001)
        grid = weight * (delay - d[0]) / (d[1] - d[0]) + (1 - weight) * (energy - e[0]) / (
            e[1] - e[0]
        )
        mine = _delay_and_energy(*scenario, device, plan.cut[device], plan.server_hz[device])
        assert (plan.delay_s[device], plan.server_energy_j[device]) == pytest.approx(mine)
        value = weight * (mine[0] - d[0]) / (d[1] - d[0]) + (1 - weight) * (mine[1] - e[0]) / (
            e[1] - e[0]
        )
        assert plan.utility[device] == pytest.approx(value, abs=1e-9)
        assert grid.min() - 1e-5 <= value <= grid.min() + 1e-9


def test_jointly_is_the_best_of_all_cuts_and_clocks_for_the_fleet() -> None:
    scenario = _scenario(7, 2, 3)
    plan = plan_card(*scenario, SERVER, delay_weight=0.8, min_cut=0, jointly=True)
    tables = [_grid(scenario, device, range(4), 400) for device in range(2)]
    d_low, d_high = (sum(table[2][i] for table in tables) for i in range(2))
    e_low, e_high = (sum(table[3][i] for table in tables) for i in range(2))
    best = np.inf
    for cuts in product(range(4), repeat=2):
        delay = tables[0][0][cuts[0]][:, None] + tables[1][0][cuts[1]]
        energy = tables[0][1][cuts[0]][:, None] + tables[1][1][cuts[1]]
        value = 0.8 * (delay - d_low) / (d_high - d_low) + 0.2 * (energy - e_low) / (e_high - e_low)
        best = min(best, value.min())
    assert best - 1e-4 <= plan.utility.sum() <= best + 1e-9
    assert plan.server_hz[0] == plan.server_hz[1]


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.floats(0.05, 0.95), st.integers(0, 3))
def test_equal_blocks_are_cut_at_an_end(seed: int, weight: float, min_cut: int) -> None:
    plan = plan_card(
        *_scenario(seed, 4, 16, equal=True), SERVER, delay_weight=weight, min_cut=min_cut
    )
    assert set(plan.cut.tolist()) <= {min_cut, 16}


def test_a_memory_cap_makes_an_inner_cut() -> None:
    costs, devices, up, down = _scenario(1, 4, 16, equal=True)
    small = Devices(devices.flops_per_s * 100, 1e9 + 5e8 * 5.5, steps=50)
    assert plan_card(costs, small, up, down, SERVER, delay_weight=0.1).cut.tolist() == [5] * 4


@pytest.mark.parametrize(("weight", "clock_hz"), [(0.0, SERVER.min_hz), (1.0, SERVER.max_hz)])
def test_one_goal_alone_takes_an_end_of_the_clock_range(weight: float, clock_hz: float) -> None:
    assert (plan_card(*_scenario(2, 5, 4), SERVER, delay_weight=weight).server_hz == clock_hz).all()


def test_infeasible_and_bad_input_is_refused() -> None:
    costs, devices, up, down = _scenario(1, 2, 4)
    with pytest.raises(InfeasibleError, match="memory of device 0"):
        plan_card(costs, Devices(devices.flops_per_s, 1e3), up, down, SERVER, delay_weight=0.5)
    with pytest.raises(FedsplitError, match="delay_weight"):
        plan_card(costs, devices, up, down, SERVER, delay_weight=np.nan)
    with pytest.raises(InfeasibleError, match=r"uplink_bps\[1\]=0.* has 0 bit"):
        plan_card(costs, devices, [1.0, 0.0], down, SERVER, delay_weight=0.5)
    with pytest.raises(FedsplitError, match=r"downlink_bps\[0\]=nan"):
        plan_card(costs, devices, up, np.nan, SERVER, delay_weight=0.5)
    with pytest.raises(FedsplitError, match="min_hz"):
        ServerClock(1.0, 2.0, 1.0, 1.0)
