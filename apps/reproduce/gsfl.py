"""GSFL: how much shorter a round is when groups of devices train in parallel."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import brentq

from fedsplit.arrays import Array
from fedsplit.plan import Branch, RoundPlan, Route

from ..plan import Scenario
from .common import (
    Chart,
    Figure,
    Reproduction,
    change,
    paper_config,
    paper_scenario,
    round_delays_s,
)

PAPER = "gsfl"
_PARTS = 16


def reproduce(overrides: Sequence[str]) -> Reproduction:
    """Compare a round with vanilla split learning's and federated learning's."""
    config = paper_config(PAPER, overrides)
    groups, rounds = config.paper.groups, config.paper.rounds
    cut = f"strategy.cut={config.paper.cut}"
    gsfl = paper_scenario(PAPER, overrides, "strategy=gsfl", cut, f"strategy.groups={groups}")
    vanilla = paper_scenario(PAPER, overrides, "strategy=vanilla", cut)
    federated = paper_scenario(PAPER, overrides, "strategy=fedlora")
    delays = {
        "vanilla SL": round_delays_s(vanilla, rounds),
        "FL": round_delays_s(federated, rounds),
        "GSFL": round_delays_s(gsfl, rounds),
        "GSFL, band divided": np.array(
            [divided_delay_s(gsfl, index) for index in range(1, rounds + 1)]
        ),
    }
    mean = {name: float(values.mean()) for name, values in delays.items()}
    best_sl_s, best_cut = best_static_sl_s(vanilla, rounds)
    steps = config.paper.more_steps
    longer = (*overrides, f"train.steps={steps}")
    long_gsfl, long_federated = (
        float(round_delays_s(paper_scenario(PAPER, longer, *changes), rounds).mean())
        for changes in (
            ("strategy=gsfl", cut, f"strategy.groups={groups}"),
            ("strategy=fedlora",),
        )
    )
    several = f"FL, {steps} local steps in both"
    against_federated = change(long_gsfl, long_federated)
    sweep = [
        paper_scenario(PAPER, overrides, "strategy=gsfl", cut, f"strategy.groups={count}")
        for count in config.paper.sweep_groups
    ]
    return Reproduction(
        PAPER,
        (
            Figure(
                name="latency of a round",
                claim="below SL (-31.45 %, remembered)",
                versus="vanilla SL",
                ours=change(mean["GSFL"], mean["vanilla SL"]),
                strongest="vanilla SL at its best static cut",
                against_strongest=change(mean["GSFL"], best_sl_s),
                gain="devices of different groups compute at the same time; the radio is shared",
                accepted=(-100.0, 0.0),
                ours_better=change(mean["GSFL, band divided"], mean["vanilla SL"]),
                better="band divided among the groups so that they end together",
            ),
            Figure(
                name="latency of a round",
                claim="below FL",
                versus="FL, the whole model on every device",
                ours=change(mean["GSFL"], mean["FL"]),
                strongest=several,
                against_strongest=against_federated,
                gain="FL sends the whole model for a single mini-batch; with more it gets cheaper",
                accepted=(-100.0, 0.0),
                ours_better=change(mean["GSFL, band divided"], mean["FL"]),
                better="band divided among the groups so that they end together",
            ),
            Figure(
                name=f"latency of a round of {steps} local steps",
                claim="none",
                versus="FL, the whole model on every device",
                ours=against_federated,
                strongest="the same",
                against_strongest=against_federated,
                gain="none where the model is sent once for several mini-batches",
            ),
        ),
        (
            Chart(
                "Latency of GSFL",
                "groups",
                "s per round",
                tuple(float(count) for count in config.paper.sweep_groups),
                {
                    "GSFL": [float(round_delays_s(one, rounds).mean()) for one in sweep],
                    "vanilla SL": [mean["vanilla SL"]] * len(sweep),
                    "FL": [mean["FL"]] * len(sweep),
                },
            ),
        ),
        (
            "The paper's 500 % faster convergence (remembered) counts rounds too, which no model "
            f"of delay gives. SL's best static cut is {best_cut} with the first seed; "
            "GSFL stays at the paper's.",
        ),
        config.paper.provenance,
    )


def best_static_sl_s(scenario: Scenario, rounds: int) -> tuple[float, int]:
    """Return the mean delay of a round of vanilla SL at its best static cut, and that cut."""
    system, blocks = scenario.system, scenario.system.profile.n_blocks
    scenes = [
        system.scene(index, dict(enumerate(system.fleet.samples.tolist())))
        for index in range(1, rounds + 1)
    ]

    def delay_s(cut: int) -> float:
        route = Route.two_tier(blocks, cut)
        plans = [RoundPlan.sequential(one.turn(n, route) for n in one.devices) for one in scenes]
        found = [
            system.timeline(plan, one.server_round).cost.delay_s
            for plan, one in zip(plans, scenes, strict=True)
        ]
        return float(np.mean(found))

    return min((delay_s(cut), cut) for cut in range(blocks))


def divided_delay_s(scenario: Scenario, server_round: int) -> float:
    """Return the delay of a round whose groups own parts of the band that let them end together.

    Bisection on the time of the round: every group's time falls with its part of the band, as a
    table of `_PARTS` parts says. The delay is of the parts that are found, not of the table.
    """
    system, plan = scenario.system, scenario.plan_round(server_round)
    channel = system.channel.realise(server_round)
    n_groups = len(plan.branches)

    def with_share(branch: Branch, share: float) -> Branch:
        return Branch(
            tuple(
                replace(
                    turn,
                    uplink_hz=share * channel.uplink_hz,
                    downlink_hz=share * channel.downlink_hz,
                )
                for turn in branch.turns
            )
        )

    clock_hz = float(system.fleet.servers.clock_hz[0]) / n_groups

    def alone_s(branch: Branch, share: float) -> float:
        slowed = tuple(
            replace(turn, server_hz=clock_hz) for turn in with_share(branch, share).turns
        )
        return system.timeline(RoundPlan((Branch(slowed),)), server_round).cost.delay_s

    parts = np.geomspace(0.1 / n_groups, 1.0, _PARTS)
    logs = np.log([[alone_s(branch, part) for part in parts] for branch in plan.branches])

    def shares_for(time_s: float) -> Array:
        # Ascending times for `interp`: a larger part takes less time.
        found = [np.interp(np.log(time_s), row[::-1], np.log(parts[::-1])) for row in logs]
        return np.exp(found)

    slowest_s = float(np.exp(logs.max()))
    time_s = brentq(lambda t: shares_for(t).sum() - 1, np.exp(logs.min()), slowest_s)
    shares = shares_for(time_s)
    shares = (shares / shares.sum()).tolist()
    divided = RoundPlan(tuple(map(with_share, plan.branches, shares)))
    return system.timeline(divided, server_round).cost.delay_s
