"""What planning all devices together gains on each paper's own objective, or that nothing can."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks._cell import BATCH, VIT, cell, sft_problem
from fedsplit.arrays import Array
from fedsplit.fleet import FleetSpec, build_fleet
from fedsplit.fleet.cost import compute_energy_j
from fedsplit.planning import (
    CutCosts,
    FedsllmProblem,
    LearningCurve,
    SftProblem,
    SplitProblem,
    WeightedProblem,
    balanced_groups,
    devices_of,
    downlink_efficiency,
    fastest_cuts,
    minmax_shares,
    plan_card,
    plan_fedsllm,
    plan_joint,
    plan_large_timescale,
    plan_small_timescale,
    plan_weighted,
    server_of,
    shannon_bps,
    split_exactly,
    uplink_snr_hz,
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


def weighted_gain(
    profile: ModelProfile, state: ChannelState, batch: int, devices: int, seed: int, weight: float
) -> Gain:
    """Return energy and delay of a parallel round: exact cuts at full speed against everything.

    Mini-batches do not wait for each other, so that what comes before and after the server adds up.
    """
    fixed = parallel_round(profile, state, batch, devices, seed, weight)
    side = np.asarray(fixed.ahead_s) + np.asarray(fixed.behind_s)
    own = split_exactly(replace(fixed, ahead_s=side, behind_s=np.zeros_like(side)))
    fleet = build_fleet(FleetSpec(devices=devices, types=KINDS), seed)
    found = plan_weighted(
        WeightedProblem(
            costs=CutCosts.from_profile(profile, batch),
            devices=devices_of(fleet, 1),
            clock_hz=fleet.devices.clock_hz,
            min_hz=fleet.devices.min_hz,
            energy_coefficient=fleet.devices.energy_coefficient,
            power_w=state.power_up_w,
            uplink_snr_hz=uplink_snr_hz(state),
            downlink_efficiency=downlink_efficiency(state),
            uplink_hz=state.uplink_hz,
            downlink_hz=state.downlink_hz,
            power_down_w=state.power_down_w,
            server=server_of(fleet),
            second_weight=weight,
        )
    )
    return Gain(own.objective, found.objective, found.bound)


def in_turn(profile: ModelProfile, state: ChannelState, batch: int, seed: int) -> Array:
    """Return the turn of every device at every cut with the bands to itself, ``[N, C]``, s."""
    fleet = build_fleet(FleetSpec(devices=state.n_devices, types=KINDS), seed)
    costs = CutCosts.from_profile(profile, batch)
    up, down = uplink_bps(state, state.uplink_hz), downlink_bps(state, state.downlink_hz)
    turn_s: Array = (
        costs.device_flops / fleet.devices.flops[:, None]
        + costs.server_flops / fleet.servers.flops[0]
        + (costs.uplink_bits + costs.adapter_bits) / up[:, None]
        + (costs.downlink_bits + costs.adapter_bits) / down[:, None]
    )
    return np.where(devices_of(fleet, 1).allowed_cuts(costs, 1), turn_s, np.inf)


def fast_gain(profile: ModelProfile, state: ChannelState, batch: int, seed: int) -> Gain:
    """Return the delay of devices in turn: it is a sum, so each device's best is all's best."""
    fleet = build_fleet(FleetSpec(devices=state.n_devices, types=KINDS), seed)
    turn_s = in_turn(profile, state, batch, seed)
    cut = fastest_cuts(
        CutCosts.from_profile(profile, batch),
        devices_of(fleet, 1),
        uplink_bps(state, state.uplink_hz),
        downlink_bps(state, state.downlink_hz),
        float(fleet.servers.flops[0]),
        min_cut=1,
    )
    own, bound = float(turn_s[np.arange(len(cut)), cut].sum()), float(turn_s.min(axis=1).sum())
    return Gain(own, own, bound)


def card_gain(profile: ModelProfile, state: ChannelState, batch: int, seed: int) -> Gain:
    """Return CARD's utility of a round, a sum too.

    The bound is of 4,000 clocks: between two, delay is at least that of the higher, energy at least
    that of the lower.
    """
    fleet = build_fleet(FleetSpec(devices=state.n_devices, types=KINDS), seed)
    costs, server, members = (
        CutCosts.from_profile(profile, batch),
        server_of(fleet),
        devices_of(fleet, 1),
    )
    up, down = uplink_bps(state, state.uplink_hz), downlink_bps(state, state.downlink_hz)
    own = float(
        plan_card(costs, members, up, down, server, delay_weight=0.5, min_cut=1).utility.sum()
    )
    fits = members.allowed_cuts(costs, 1)[:, :, None]
    cycles = costs.server_flops[:, None] / server.flops_per_cycle
    clock = np.geomspace(server.min_hz, server.max_hz, 4_000)
    alone = in_turn(profile, state, batch, seed) - costs.server_flops / fleet.servers.flops[0]
    delay = np.where(fits, np.where(fits, alone[:, :, None], 0.0) + cycles / clock, np.nan)
    energy = np.where(fits, server.energy_coefficient * cycles * clock**2, np.nan)
    least, most = (extreme(delay, axis=(1, 2)) for extreme in (np.nanmin, np.nanmax))
    served = np.where(cycles > 0, energy, np.nan)
    saving, dearest = np.nanmin(served, axis=(1, 2)), np.nanmax(energy, axis=(1, 2))
    scaled_s = (delay - least[:, None, None]) / (most - least)[:, None, None]
    scaled_j = (energy - saving[:, None, None]) / (dearest - saving)[:, None, None]
    cells = 0.5 * scaled_s[:, :, 1:] + 0.5 * scaled_j[:, :, :-1]
    return Gain(own, own, float(np.nanmin(cells, axis=(1, 2)).sum()))


def gsfl_gain(
    profile: ModelProfile, state: ChannelState, batch: int, seed: int, groups: int = 4
) -> Gain:
    """Return the delay of groups that each own a part of everything: one cut, or each its own."""
    part = replace(
        state,
        uplink_hz=state.uplink_hz / groups,
        downlink_hz=state.downlink_hz / groups,
        power_down_w=state.power_down_w / groups,
    )
    fleet = build_fleet(FleetSpec(devices=state.n_devices, types=KINDS), seed)
    costs = CutCosts.from_profile(profile, batch)
    shared = costs.server_flops / fleet.servers.flops[0]
    turn_s = in_turn(profile, part, batch, seed) + (groups - 1) * shared
    own = balanced_groups(turn_s[:, 2], groups).makespan_s
    ours = balanced_groups(turn_s.min(axis=1), groups)
    return Gain(own, ours.makespan_s, ours.bound_s)


def fedsllm_gain(profile: ModelProfile, state: ChannelState, batch: int, seed: int) -> Gain:
    """Return FedsLLM's whole training: its cut of 2 blocks against a cut for each client."""
    fleet = build_fleet(FleetSpec(devices=state.n_devices, types=KINDS), seed)
    costs, snr = CutCosts.from_profile(profile, batch), uplink_snr_hz(state)
    learning = LearningCurve.from_constants(1.0, 1.0, 0.1, 0.1, 1e-3)
    fits = devices_of(fleet, 1).allowed_cuts(costs, 1)
    everyone = np.arange(state.n_devices)

    def problem(cut: NDArray[np.int64]) -> FedsllmProblem:
        return FedsllmProblem(
            device_s=costs.device_flops[cut] / fleet.devices.flops,
            smashed_bits=costs.uplink_bits[cut],
            adapter_bits=costs.adapter_bits[cut],
            main_snr_hz=snr,
            fed_snr_hz=snr,
            main_hz=state.uplink_hz / 2,
            fed_hz=state.uplink_hz / 2,
            learning=learning,
        )

    def total_s(cut: NDArray[np.int64]) -> float:
        return plan_fedsllm(problem(cut)).total_s

    own = total_s(np.full(len(everyone), 2))
    common = [c for c in range(1, costs.n_blocks + 1) if fits[:, c].all()]
    best = min((np.full(len(everyone), c) for c in common), key=total_s)
    accuracy = plan_fedsllm(problem(best)).accuracy
    least = minmax_shares(*problem(best).round_at(accuracy)).objective_s
    for device in everyone:
        for cut in np.flatnonzero(fits[device]):
            changed = np.where(everyone == device, cut, best)
            found = minmax_shares(*problem(changed).round_at(accuracy)).objective_s
            if found < least:
                best, least = changed, found
    # No client is faster than with both bands to itself; between two numbers of iterations there
    # are at least the higher one's rounds, each at least as long as with the lower one.
    rate = shannon_bps(state.uplink_hz / 2, snr)[:, None]
    sent = np.where(fits, (costs.uplink_bits + costs.adapter_bits) / rate, np.inf)
    compute = costs.device_flops / fleet.devices.flops[:, None]
    counts = np.geomspace(1e-3, 1e3, 2_000)
    rounds = learning.rounds / (1 - np.exp2(-counts / learning.iterations))
    least_s = np.array([(sent + n * compute).min(axis=1).max() for n in counts])
    bound = float((rounds[1:] * least_s[:-1]).min())
    return Gain(own, min(own, total_s(best)), bound)


OBJECTIVES: dict[str, Callable[[int], Gain]] = {
    "SFT: delay of a round, s": lambda seed: sft_gain(sft_problem(20, seed)),
    "cuts of each alone, parallel round: delay, s": lambda seed: split_gain(
        parallel_round(VIT, cell(20, seed), BATCH, 20, seed, np.inf)
    ),
    "the same: energy + 10 W x delay, J": lambda seed: split_gain(
        parallel_round(VIT, cell(20, seed), BATCH, 20, seed, 10.0)
    ),
    "exact cuts at full speed: energy + 10 W x delay, J": lambda seed: weighted_gain(
        VIT, cell(20, seed), BATCH, 20, seed, 10.0
    ),
    "Fast: devices in turn, delay, s": lambda seed: fast_gain(VIT, cell(20, seed), BATCH, seed),
    "CARD: utility of a round": lambda seed: card_gain(VIT, cell(20, seed), BATCH, seed),
    "FedsLLM: training, s": lambda seed: fedsllm_gain(VIT, cell(20, seed), BATCH, seed),
    "GSFL: round of 4 groups, s": lambda seed: gsfl_gain(VIT, cell(20, seed), BATCH, seed),
}


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
