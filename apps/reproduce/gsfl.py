"""GSFL: how much shorter a round is when groups of devices train in parallel."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import brentq

from fedsplit.plan import Branch, RoundPlan

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
_BISECTIONS = 12


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
    sweep = [
        paper_scenario(PAPER, overrides, "strategy=gsfl", cut, f"strategy.groups={count}")
        for count in config.paper.sweep_groups
    ]
    return Reproduction(
        PAPER,
        (
            Figure(
                "latency of a round",
                "below SL (-31.45 %, remembered)",
                "vanilla SL",
                change(mean["GSFL"], mean["vanilla SL"]),
                (-100.0, 0.0),
                change(mean["GSFL, band divided"], mean["vanilla SL"]),
                "band divided among the groups so that they end together",
            ),
            Figure(
                "latency of a round",
                "below FL",
                "FL, the whole model on every device",
                change(mean["GSFL"], mean["FL"]),
                (-100.0, 0.0),
                change(mean["GSFL, band divided"], mean["FL"]),
                "band divided among the groups so that they end together",
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
            f"A round of FL takes {mean['FL'] / mean['GSFL']:.1f} times as long as one of GSFL; "
            "the paper's 500 % faster convergence (remembered) counts rounds too, which no "
            "model of delay gives.",
        ),
        config.paper.provenance,
    )


def divided_delay_s(scenario: Scenario, server_round: int) -> float:
    """Return the delay of a round whose groups own parts of the band that let them end together.

    Bisection on the time of the round: every group's time falls with its part of the band.
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

    def share_for(branch: Branch, time_s: float) -> float:
        if alone_s(branch, 1.0) >= time_s:
            return 1.0
        return float(brentq(lambda b: alone_s(branch, b) - time_s, 1e-4, 1.0, rtol=1e-3))

    low, high = 0.0, max(alone_s(branch, 1 / n_groups) for branch in plan.branches)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if sum(share_for(branch, middle) for branch in plan.branches) <= 1:
            high = middle
        else:
            low = middle
    shares = [share_for(branch, high) for branch in plan.branches]
    shares = [share / sum(shares) for share in shares]
    divided = RoundPlan(tuple(map(with_share, plan.branches, shares)))
    return system.timeline(divided, server_round).cost.delay_s
