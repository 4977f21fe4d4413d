"""GSFL: how much shorter a round is when groups of devices train in parallel."""

from dataclasses import replace

import numpy as np
from scipy.optimize import brentq

from fedsplit.arrays import Array
from fedsplit.plan import Branch, RoundPlan

from ..plan import Scenario
from .study import Case

_PARTS = 16


def add(case: Case) -> None:
    """Cost all members, vanilla SL at its best cut, and GSFL where each group has its own band."""
    delay, scenario = case.cost()["delay_s"], case.scenarios["GSFL"]
    rounds = range(1, case.config.rounds + 1)
    divided = [divided_delay_s(scenario, index) for index in rounds]
    by_cut = delay["vanilla SL by cut"]
    case.add("delay_s", "GSFL, band divided", divided)
    case.add("delay_s", "vanilla SL, best cut", by_cut.min())
    case.words["best_cut"] = case.x["vanilla SL by cut"][by_cut.argmin()]


def divided_delay_s(scenario: Scenario, server_round: int) -> float:
    """Return the delay of a round whose groups own parts of the band that let them end together.

    Bisection on the time of the round: every group's time falls with its part of the band, as a
    table of `_PARTS` parts says. The delay is of the parts that are found, not of the table.
    """
    system, plan = scenario.system, scenario.plan_round(server_round)
    channel = system.channel.realise(server_round)
    n_groups = len(plan.branches)

    clock_hz = float(system.fleet.servers.clock_hz[0]) / n_groups

    def with_share(branch: Branch, share: float, server_hz: float | None = None) -> Branch:
        up_hz, down_hz = share * channel.uplink_hz, share * channel.downlink_hz
        return Branch(
            tuple(
                replace(turn, uplink_hz=up_hz, downlink_hz=down_hz, server_hz=server_hz)
                for turn in branch.turns
            )
        )

    def alone_s(branch: Branch, share: float) -> float:
        alone = RoundPlan((with_share(branch, share, clock_hz),))
        return system.timeline(alone, server_round).cost.delay_s

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
