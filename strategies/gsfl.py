"""GSFL: groups of devices train in parallel, the devices of a group one after the other."""

from collections.abc import Sequence
from dataclasses import replace

from fedsplit.arrays import Array
from fedsplit.errors import require, require_choice
from fedsplit.plan import RoundPlan, Turn
from fedsplit.planning import Grouping, balanced_groups, exact_groups, random_groups
from fedsplit.schemes import Cut, CutRule, Scene, Scheme
from fedsplit.seeds import generator

GROUPINGS = ("balanced", "exact", "random")
WEIGHTS = ("samples", "equal")


class Gsfl(Scheme):
    """M branches of several devices each; what the last device of a group leaves is averaged.

    With one group this is vanilla split learning, with as many groups as devices SplitFed.

    Parameters
    ----------
    groups : int
        Number of groups, at most as many as devices; fewer form where fewer devices take part.
    cut : int, str or mapping
        Blocks on the device, or the scheme whose cuts are taken (`fedsplit.schemes.CutRule`).
    tail : int, optional
        Blocks on the device behind the server; labels then never leave the device.
    grouping : str
        "balanced": longest turn first to the least busy group; "exact": the best grouping, for at
        most 14 devices; "random": drawn anew in every round.
    weights : str
        "samples": a group counts by its training samples; "equal": all count the same, as in the
        authors' code.

    Notes
    -----
    S. Zhang et al., "Split Federated Learning: Speed up Model Training in Resource-Limited
    Wireless Networks", arXiv 2305.18889.
    """

    def __init__(
        self,
        groups: int = 2,
        cut: Cut = 2,
        tail: int | None = None,
        grouping: str = "balanced",
        weights: str = "samples",
    ) -> None:
        require_choice("strategy.grouping", grouping, GROUPINGS)
        require_choice("strategy.weights", weights, WEIGHTS)
        self.groups = groups
        self.cuts = CutRule(cut, tail)
        self.grouping = grouping
        self.weights = weights

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Form the groups for the channel of this round."""
        most = scene.fleet.n_devices
        require(1 <= self.groups <= most, "strategy.groups", self.groups, f"1 to {most} devices")
        n_groups = min(self.groups, len(scene.devices))
        turns = self.cuts.turns(scene, at_once=n_groups)
        grouping = self._group(turn_times_s(scene, turns, n_groups), n_groups, scene)
        return RoundPlan.grouped([turns[place] for place in group] for group in grouping.groups)

    def branch_weight(self, samples: Sequence[int]) -> int:
        """Count a group by its samples, or every group once."""
        return sum(samples) if self.weights == "samples" else 1

    def _group(self, times_s: Array, n_groups: int, scene: Scene) -> Grouping:
        if self.grouping == "random":
            rng = generator(scene.seed, "groups", scene.server_round)
            return random_groups(times_s, n_groups, rng)
        return (exact_groups if self.grouping == "exact" else balanced_groups)(times_s, n_groups)


def turn_times_s(scene: Scene, turns: Sequence[Turn], n_groups: int) -> Array:
    """Return how long each turn takes in a group that owns ``1 / n_groups`` of band and server.

    ``E (F_c / C_i + S / R_i(B / M) + F_s / (C_s / M) + S / R_i) + |theta_c| / R_i`` (papers'
    section 6 (b)): what the timeline charges a device that has such a share to itself.
    """
    shared = (
        replace(
            turn,
            uplink_hz=scene.channel.uplink_hz / n_groups,
            downlink_hz=scene.channel.downlink_hz / n_groups,
            server_hz=float(scene.fleet.servers.clock_hz[0]) / n_groups,
        )
        for turn in turns
    )
    line = scene.on(scene.channel).timeline(RoundPlan.sequential(shared))
    times: Array = line.turn_end_s - line.turn_start_s
    return times
