"""What planning all devices together gains on each paper's own objective, or that nothing can."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from fedsplit.fleet import FleetSpec, build_fleet
from fedsplit.fleet.cost import compute_energy_j
from fedsplit.planning import (
    CutCosts,
    SftProblem,
    SplitProblem,
    devices_of,
    plan_joint,
    plan_large_timescale,
    plan_small_timescale,
    split_exactly,
)
from fedsplit.profiles import ModelProfile
from fedsplit.seeds import generator
from fedsplit.wireless import ChannelState, downlink_bps, uplink_bps

KINDS = ("jetson_tx2", "jetson_orin_nano", "jetson_orin_nx", "jetson_agx_orin")


@dataclass(frozen=True)
class Gain:
    """An objective under a paper's own planner and under ours; no plan is below `bound`."""

    own: float
    ours: float
    bound: float


def sft_gain(problem: SftProblem) -> Gain:
    """Return the delay of a round: SFT's common cut and exact bands against `plan_joint`."""
    common = plan_large_timescale(problem)
    own_s = plan_small_timescale(problem, common.cut, common.ratio).objective_s
    joint = plan_joint(problem)
    return Gain(own_s, joint.round_s, joint.bound_s)


def parallel_round(
    profile: ModelProfile, state: ChannelState, batch: int, devices: int, seed: int, weight: float
) -> SplitProblem:
    """Return an iteration of `devices` boards of several kinds with equal bands, in parallel."""
    fleet = build_fleet(FleetSpec(devices=devices, types=KINDS), seed)
    costs = CutCosts.from_profile(profile, batch)
    boards, server = fleet.devices, fleet.servers
    units = [profile.embed, *profile.blocks]
    forward, backward = (
        batch * np.cumsum([getattr(unit, name) for unit in units])
        for name in ("forward_flops", "backward_flops")
    )
    up_s = costs.uplink_bits / uplink_bps(state, state.uplink_hz / devices)[:, None]
    down_s = costs.downlink_bits / downlink_bps(state, state.downlink_hz / devices)[:, None]
    speed = boards.flops[:, None]
    fits = devices_of(fleet, 1).allowed_cuts(costs, 1)
    at_device = compute_energy_j(
        forward + backward,
        boards.clock_hz[:, None],
        boards.flops_per_cycle[:, None],
        boards.energy_coefficient[:, None],
    )
    at_server = compute_energy_j(
        costs.server_flops,
        server.clock_hz[0],
        server.flops_per_cycle[0],
        server.energy_coefficient[0],
    )
    sending = np.broadcast_to(np.asarray(state.power_up_w), (devices,))[:, None] * up_s
    return SplitProblem(
        np.where(fits, forward / speed + up_s, np.inf),
        np.broadcast_to(costs.server_flops / server.flops[0], up_s.shape),
        down_s + backward / speed,
        at_device + at_server + sending,
        weight,
    )


def alone(problem: SplitProblem) -> np.ndarray:
    """Return what every device would choose if it were the only one: Fast's and CARD's way."""
    per_joule, per_second = problem.weights
    turn_s = (
        np.asarray(problem.ahead_s) + np.asarray(problem.server_s) + np.asarray(problem.behind_s)
    )
    return np.asarray((per_joule * np.asarray(problem.energy_j) + per_second * turn_s).argmin(1))


def split_gain(problem: SplitProblem) -> Gain:
    """Return the objective of a parallel round: each device's own best cut against the exact."""
    found = split_exactly(problem)
    return Gain(problem.objective(alone(problem)), found.objective, found.bound)


def show_gains(
    objectives: Mapping[str, Callable[[int], Gain]], seeds: int, console: Console
) -> dict[str, list[dict[str, float]]]:
    """Print every objective with seeds 0 and up: own planner, ours, what no plan can pass."""
    table = Table("objective", "seed", "own planner", "jointly", "gain", "bound", title="jointly")
    gains: dict[str, list[dict[str, float]]] = {name: [] for name in objectives}
    for name, compare in objectives.items():
        for seed in range(seeds):
            found = compare(seed)
            gain = 1 - found.ours / found.own
            gains[name].append(
                {"own": found.own, "ours": found.ours, "bound": found.bound, "gain": gain}
            )
            values = (f"{value:.4g}" for value in (found.own, found.ours))
            table.add_row(name, str(seed), *values, f"{gain:.1%}", f"{found.bound:.4g}")
    console.print(table)
    return gains


def exact_cpu_s(devices: int = 100, cuts: int = 33) -> float:
    """Return the processor time of the dearest kind of round: all values at random."""
    rng = generator(0, "benchmark", "exact")
    ahead, server, behind, energy = (rng.random((devices, cuts)) for _ in range(4))
    problem = SplitProblem(ahead, server, behind, energy, 1.0)
    begin = time.process_time()
    split_exactly(problem)
    return time.process_time() - begin
