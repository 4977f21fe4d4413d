"""How fast the planners are, and how far from the best.

    python -m benchmarks.planning [--rounds 15]
    python -m benchmarks.planning --joint     only what joint planning gains

Cuts of model graphs (block-wise, general, and other solvers), then everything else on fleets of
the catalogue in a 20 MHz cell. Contestants take turns; figures are medians. A gap is the largest
relative distance from an oracle over several random fleets: a conic solver (Clarabel), a fine grid,
enumeration, or the exact method for the papers' own; "certified" is the planner's own bound.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from itertools import product

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks._cell import BATCH, STEPS, VIT, cell, sft_problem, uplinks
from benchmarks._conic import conic_s
from benchmarks._joint import OBJECTIVES, exact_cpu_s, show_gains
from benchmarks._ten import PLAN_AIMS_S, plan_cpu_s
from fedsplit.fleet import FleetSpec, build_fleet
from fedsplit.planning import (
    CutCosts,
    FedsllmProblem,
    LearningCurve,
    balanced_groups,
    devices_of,
    equal_shares,
    exact_groups,
    minmax_shares,
    minmax_shares_sqp,
    plan_card,
    plan_fedsllm,
    plan_joint,
    plan_large_timescale,
    plan_large_timescale_alm,
    plan_small_timescale,
    server_of,
    uplink_snr_hz,
)
from fedsplit.seeds import generator
from fedsplit.wireless import downlink_bps, uplink_bps

USERS = (10, 100, 1_000, 10_000)
DEVICES, SEEDS = 100, 5
AIMS = {
    "general cut, ms, to 1,500 vertices": 1.0,
    "blockwise cut, ms": 0.2,
    "chain, ms": 0.02,
    "bandwidth, 1,000 users, ms": 1.0,
    "bandwidth, 10,000 users, ms": 10.0,
    "two timescales, s": 1.0,
}
CUT_COLUMNS = (
    "general", "blockwise", "chain", "general_first", "blockwise_first", "networkx", "scipy_lp",
    "exhaustive",
)  # fmt: skip
# What a gap may be at most: rounding for exact methods (integer flows for cuts), the solver's or
# grid's own precision where that is the limit, the guarantee of the others.
GAP_FLOORS = {
    "cut": 1e-6,
    "bandwidth_clarabel": 1e-8,
    "bandwidth_certified": 1e-10,
    "fedsllm_clarabel": 1e-6,
    "card_grid": 1e-6,
    "sqp": 1e-6,
    "sft_enumeration": 1e-9,
    "augmented_lagrangian": 1e-6,
    "joint_certified": 0.05,
    "lpt": 1 / 3,
}


def median_ms(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Let the contestants take turns, after one turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def cuts(
    rounds: int, gaps: dict[str, float], console: Console
) -> dict[str, dict[str, float | None]]:
    """Time cuts of real models; compare the general cut with every other method."""
    # Tracing models takes a torch that nothing else here needs.
    from benchmarks._cuts import measure_cuts

    found = measure_cuts(rounds)
    title = "cut of a model graph, ms (first: with the graph's preparation)"
    table = Table("model", "vertices", *CUT_COLUMNS, title=title)
    for model, row in found.items():
        values = (row.get(name) for name in CUT_COLUMNS)
        table.add_row(
            model,
            f"{row['vertices']:,.0f}",
            *("-" if value is None else f"{value:.3f}" for value in values),
        )
    console.print(table)
    gaps["cut"] = max(float(row["gap"] or 0.0) for row in found.values())
    return found


def bandwidth(rounds: int, gaps: dict[str, float], console: Console) -> dict[str, float]:
    """Time the min-max division of a band; compare with SLSQP and Clarabel up to 100 users."""
    table = Table("users", "exact", "SLSQP", "Clarabel", "certified gap", title="bandwidth, ms")
    exact_ms, certified, conic, sqp = {}, [], [], []
    for users in USERS:
        pools, fixed = uplinks(users, 0)
        contestants: dict[str, Callable[[], object]] = {
            "exact": lambda pools=pools, fixed=fixed: minmax_shares(pools, fixed)
        }
        found = minmax_shares(pools, fixed)
        certified.append(found.gap)
        if users <= 100:
            contestants["SLSQP"] = lambda pools=pools, fixed=fixed: minmax_shares_sqp(pools, fixed)
            contestants["Clarabel"] = lambda pools=pools, fixed=fixed: conic_s(pools, fixed)
            conic.append(abs(found.objective_s / conic_s(pools, fixed) - 1))
            sqp.append(minmax_shares_sqp(pools, fixed).objective_s / found.objective_s - 1)
        took = median_ms(contestants, rounds if users > 100 else max(3, rounds // 5))
        took |= median_ms({"exact": contestants["exact"]}, rounds)
        exact_ms[str(users)] = took["exact"]
        others = (f"{took[name]:.1f}" if name in took else "-" for name in ("SLSQP", "Clarabel"))
        table.add_row(f"{users:,}", f"{took['exact']:.2f}", *others, f"{found.gap:.1e}")
    console.print(table)
    gaps["bandwidth_certified"] = max(certified)
    gaps["bandwidth_clarabel"] = max(conic)
    gaps["sqp"] = max(sqp)
    return exact_ms


def two_timescale(rounds: int, gaps: dict[str, float], console: Console) -> dict[str, float]:
    """Time SFT's planners and the joint one for a fleet of `DEVICES`."""
    problem = sft_problem(DEVICES, 0)
    plan = plan_large_timescale(problem)

    def paper() -> None:
        found = plan_large_timescale_alm(problem).plan
        plan_small_timescale(problem, found.cut, found.ratio)

    def exact() -> None:
        found = plan_large_timescale(problem)
        plan_small_timescale(problem, found.cut, found.ratio)

    took = median_ms(
        {
            "augmented Lagrangian, exact spectrum": paper,
            "exact in both": exact,
            "joint, a cut for each device": lambda: plan_joint(problem),
        },
        max(3, rounds // 3),
    )
    sqp = {
        "SLSQP for the spectrum": lambda: plan_small_timescale(
            problem, plan.cut, plan.ratio, method="sqp"
        )
    }
    took |= median_ms(sqp, 1)
    table = Table("method", "ms", title=f"SFT's plan for {DEVICES} devices")
    for name, value in took.items():
        table.add_row(name, f"{value:.1f}")
    console.print(table)
    fleets = [sft_problem(20, seed) for seed in range(SEEDS)]
    exact_s = [plan_large_timescale(one).round_s for one in fleets]
    alm_s = [plan_large_timescale_alm(one).plan.round_s for one in fleets]
    gaps["augmented_lagrangian"] = max(a / e - 1 for a, e in zip(alm_s, exact_s, strict=True))
    gaps["sft_enumeration"] = max(enumeration_gap(seed) for seed in range(SEEDS))
    joint = [plan_joint(one) for one in (*fleets, problem)]
    gaps["joint_certified"] = max(one.gap for one in joint)
    spectrum = plan_small_timescale(problem, plan.cut, plan.ratio).objective_s
    console.print(f"joint plan: round {1 - joint[-1].round_s / spectrum:.1%} shorter than SFT's")
    return took


def enumeration_gap(seed: int) -> float:
    """Return how far SFT's large timescale is from the best of all cuts and settings."""
    problem = sft_problem(3, seed, blocks=4, settings=5)
    ratio, loss = problem.table.ratio, problem.table.loss_increase
    best = np.inf
    for setting in map(list, product(range(5), repeat=3)):
        if problem.shares_of_data @ loss[setting] <= problem.loss_limit:
            rounds = (
                equal_shares(*problem.pools(cut, ratio[setting])).objective_s for cut in range(1, 5)
            )
            best = min(best, *rounds)
    return abs(plan_large_timescale(problem).round_s / best - 1)


def fedsllm(rounds: int, gaps: dict[str, float]) -> dict[str, float]:
    """Time FedsLLM's plan for 50 clients; compare the division at its accuracy with Clarabel."""
    learning = LearningCurve.from_constants(1.0, 1.0, 0.1, 0.1, 1e-3)
    problems = []
    for seed in range(SEEDS):
        rng, state = generator(seed, "benchmark", "fedsllm"), cell(50, seed)
        cycles = 0.2 * rng.uniform(1e4, 3e4, 50) * 500
        snr = uplink_snr_hz(state)
        band = state.uplink_hz
        problems.append(
            FedsllmProblem(
                device_s=cycles / 2e9,
                smashed_bits=28.1e3,
                adapter_bits=28.1e3,
                main_snr_hz=snr,
                fed_snr_hz=snr,
                main_hz=band,
                fed_hz=band,
                learning=learning,
            )
        )
    distance = []
    for problem in problems:
        plan = plan_fedsllm(problem)
        pools, compute = problem.round_at(plan.accuracy)
        distance.append(abs(plan.round_s / conic_s(pools, compute) - 1))
    gaps["fedsllm_clarabel"] = max(distance)
    return median_ms({"FedsLLM, 50 clients": lambda: plan_fedsllm(problems[0])}, rounds)


def card_planner(rounds: int, gaps: dict[str, float]) -> dict[str, float]:
    """Time CARD for 1,000 devices; compare its utility with a grid of 20,001 clocks."""
    costs = CutCosts.from_profile(VIT, BATCH)
    distance, contestants = [], {}
    for devices in (1_000, 8):
        fleet, state = build_fleet(FleetSpec(devices=devices), 0), cell(devices, 0)
        up, down = uplink_bps(state, state.uplink_hz), downlink_bps(state, state.downlink_hz)
        members, server = devices_of(fleet, STEPS), server_of(fleet)

        def run(rates=(up, down), members=members, server=server):
            return plan_card(costs, members, *rates, server, delay_weight=0.8)

        contestants[f"CARD, {devices:,} devices"] = run
    plan = run()
    allowed = members.allowed_cuts(costs, 1)
    clock = np.geomspace(server.min_hz, server.max_hz, 20_001)
    for device in range(8):
        base = costs.adapter_bits * (1 / up[device] + 1 / down[device]) + STEPS * (
            costs.device_flops / members.flops_per_s[device]
            + costs.uplink_bits / up[device]
            + costs.downlink_bits / down[device]
        )
        cycles = STEPS * costs.server_flops / server.flops_per_cycle
        fits = allowed[device]
        delay = (base[:, None] + cycles[:, None] / clock)[fits]
        energy = (server.energy_coefficient * cycles[:, None] * clock**2)[fits]
        grid = 0.8 * (delay - delay.min()) / np.ptp(delay)
        grid += 0.2 * (energy - energy.min()) / np.ptp(energy)
        distance.append(abs(plan.utility[device] - grid.min()))
    gaps["card_grid"] = max(distance)
    return median_ms(contestants, rounds)


def grouping(rounds: int, gaps: dict[str, float]) -> dict[str, float]:
    """Time LPT for 1,000 devices; compare with the best grouping of 12 devices in 4."""
    times = [generator(seed, "benchmark", "groups").uniform(1, 5, 12) for seed in range(SEEDS)]
    pairs = [(balanced_groups(t, 4), exact_groups(t, 4)) for t in times]
    gaps["lpt"] = max(quick.makespan_s / best.makespan_s - 1 for quick, best in pairs)
    many = generator(0, "benchmark", "groups").uniform(1, 5, 1_000)
    return median_ms({"LPT, 1,000 devices in 20 groups": lambda: balanced_groups(many, 20)}, rounds)


def main() -> int:
    """Print the tables; return 1 if a gap is larger than its floor."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--joint", action="store_true", help="only what joint planning gains")
    options = parser.parse_args()
    rounds: int = options.rounds
    console = Console(width=120)
    gaps: dict[str, float] = {}
    joint = show_gains(
        OBJECTIVES,
        SEEDS,
        console,
    )
    exact_s = exact_cpu_s()
    console.print(f"exact cuts of 100 devices, 32 blocks: {exact_s:.2f} s")
    if options.joint:
        print(json.dumps({"joint": joint, "exact_cpu_s": exact_s}))
        return 0
    planned_s = plan_cpu_s()
    cut_ms = cuts(rounds, gaps, console)
    bandwidth_ms = bandwidth(rounds, gaps, console)
    sft = two_timescale(rounds, gaps, console)
    rest = fedsllm(rounds, gaps) | card_planner(rounds, gaps) | grouping(rounds, gaps)
    table = Table("planner", "ms", title="others")
    for name, value in rest.items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
    table = Table("gap", "largest", "allowed", title="relative distance from the oracle")
    for name, value in gaps.items():
        table.add_row(name, f"{value:.1e}", f"{GAP_FLOORS[name]:.1e}")
    console.print(table)
    two_timescale_s = max(v for k, v in sft.items() if not k.startswith("SLSQP")) / 1e3
    small = [row for row in cut_ms.values() if row["vertices"] <= 1_500]
    figures = (
        max(row["general"] for row in small),
        max(row["blockwise"] for row in cut_ms.values()),
        max(row["chain"] for row in cut_ms.values() if row.get("chain") is not None),
        bandwidth_ms["1000"],
        bandwidth_ms["10000"],
        two_timescale_s,
    )
    for (name, aim), figure in zip(AIMS.items(), figures, strict=True):
        verdict = "reached" if figure <= aim else "missed"
        console.print(f"aim {name} <= {aim:g}: {figure:.3g}, {verdict}")
    missed = [name for name, value in gaps.items() if not value <= GAP_FLOORS[name]]
    for name, aim_s in PLAN_AIMS_S.items():
        verdict = "reached" if planned_s[name] <= aim_s else "missed"
        console.print(f"aim ten schemes, {name}, <= {aim_s:g} s: {planned_s[name]:.1f}, {verdict}")
    for name in missed:
        console.print(f"gap {name}: {gaps[name]:.2e} is above {GAP_FLOORS[name]:.1e}")
    print(
        json.dumps(
            {
                "cut_ms": cut_ms,
                "bandwidth_ms": bandwidth_ms,
                "two_timescale_s": two_timescale_s,
                "gaps": gaps,
                "plan_cpu_s": planned_s,
                "joint": joint,
                "exact_cpu_s": exact_s,
            }
        )
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
