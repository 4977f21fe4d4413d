"""SplitLLM: users, edges and a cloud; in every round users of each edge train."""

from dataclasses import replace
from itertools import groupby

import numpy as np

from fedsplit.arrays import Array
from fedsplit.errors import require, require_choice
from fedsplit.plan import CLOUD, DEVICE, EDGE, RoundPlan, Route, Turn
from fedsplit.planning import associate_by_channel, associate_by_load, select_users
from fedsplit.planning.association import RULES, Ints
from fedsplit.schemes import Scene, Scheme
from fedsplit.wireless import downlink_bps, uplink_bps

ASSOCIATIONS = ("home", "channel", "load")


class SplitLlm(Scheme):
    """K branches of one user each, over its own edge server to the cloud.

    The servers hold K branches at a time instead of one for each user, which saves the memory; a
    pass over all N users takes ``ceil(N / K)`` rounds, which is what it costs.

    With `edge_rounds` the aggregation is hierarchical, an extension of the paper's scheme: each
    edge's users train side by side and the edge averages them, so many times before the cloud
    averages the edges.

    Parameters
    ----------
    device_cut : int
        Blocks on the user's device.
    edge_cut : int, optional
        Blocks on device and edge together; the rest is the cloud's. None leaves the cloud nothing
        but aggregation: two tiers.
    tail : int, optional
        Blocks on the device behind the servers; labels then never leave the device.
    selection : str
        "round_robin": an edge's users take turns, nobody twice before all others; "random": drawn
        anew in every round.
    association : str
        Which edge serves a user, once for the whole run: "home", the fleet's; "channel", the one
        of least time in total, no edge with more than ``ceil(N / K)`` users; "load", so that the
        busiest edge has as little to do as possible.
    edge_rounds : int
        Edge rounds in each round of the cloud's; 0 for none, the paper's scheme.
    users_per_edge : int, optional
        Users of each edge that train in a round; None for one without edge rounds, and for all
        with them.

    Notes
    -----
    S. Zhang et al., "SplitLLM: Hierarchical Split Learning for Large Language Model over Wireless
    Network", arXiv 2501.13318.
    """

    def __init__(
        self,
        device_cut: int = 1,
        edge_cut: int | None = 3,
        tail: int | None = None,
        *,
        selection: str = "round_robin",
        association: str = "home",
        edge_rounds: int = 0,
        users_per_edge: int | None = None,
    ) -> None:
        require_choice("strategy.selection", selection, RULES)
        require_choice("strategy.association", association, ASSOCIATIONS)
        require(edge_rounds >= 0, "strategy.edge_rounds", edge_rounds, "at least 0")
        require(
            users_per_edge is None or users_per_edge >= 1,
            "strategy.users_per_edge",
            users_per_edge,
            "null or at least 1",
        )
        self.device_cut = device_cut
        self.edge_cut = edge_cut
        self.tail = tail
        self.selection = selection
        self.association = association
        self.edge_rounds = edge_rounds
        self.users_per_edge = users_per_edge

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Choose users of every edge that has any."""
        route = self.route(scene.n_blocks)
        edge = self.edges(scene)[list(scene.devices)]
        count = self.users_per_edge if self.users_per_edge or self.edge_rounds else 1
        chosen = select_users(edge, scene.server_round - 1, scene.seed, self.selection, count)
        turns = [
            replace(scene.turn(scene.devices[place], route), edge=int(edge[place]))
            for place in chosen
        ]
        if self.edge_rounds == 0:
            return RoundPlan.parallel(turns)
        of_edge = groupby(turns, key=lambda turn: turn.edge)
        return RoundPlan.hierarchical((group for _, group in of_edge), self.edge_rounds)

    def plan_evaluation(self, scene: Scene) -> tuple[Turn, ...]:
        """Let every user evaluate over its own edge."""
        edge, route = self.edges(scene), self.route(scene.n_blocks)
        return tuple(
            replace(scene.turn(device, route), edge=int(edge[device])) for device in scene.devices
        )

    def edges(self, scene: Scene) -> Ints:
        """Return the edge of every user of the fleet, shape ``[N]``."""
        require(scene.fleet.n_edges > 0, "fleet.edges", 0, "at least 1 for strategy=splitllm")
        if self.association == "home":
            return scene.fleet.home
        times_s = edge_times_s(scene, self.route(scene.n_blocks))
        associate = associate_by_channel if self.association == "channel" else associate_by_load
        return associate(times_s).edge

    def route(self, n_blocks: int) -> Route:
        """Return the route of every user through a model of `n_blocks` blocks."""
        cuts, tiers = [self.device_cut], [DEVICE, EDGE]
        if self.edge_cut is not None:
            cuts, tiers = [*cuts, self.edge_cut], [*tiers, CLOUD]
        if self.tail is not None:
            cuts, tiers = [*cuts, n_blocks - self.tail], [*tiers, DEVICE]
        return Route.through(n_blocks, cuts, tiers)


def edge_times_s(scene: Scene, route: Route) -> Array:
    """Return how long a turn of every user of the fleet takes at each edge, shape ``[N, K]``.

    On the mean channel of round 1, with ``1 / K`` of the bands; infinite out of an edge's reach.
    """
    fleet, mean = scene.fleet, scene.mean_channel(1)
    shares_hz = mean.uplink_hz / fleet.n_edges, mean.downlink_hz / fleet.n_edges
    everyone = replace(scene, samples=dict(enumerate(fleet.samples.tolist())))
    times: Array = np.full((fleet.n_devices, fleet.n_edges), np.inf)
    for edge in range(fleet.n_edges):
        there = mean.over(np.full(fleet.n_devices, edge))
        heard = (uplink_bps(there, shares_hz[0]) > 0) & (downlink_bps(there, shares_hz[1]) > 0)
        users = np.flatnonzero(heard)
        if len(users) == 0:
            continue
        turns = (
            replace(
                everyone.turn(int(user), route),
                edge=edge,
                uplink_hz=shares_hz[0],
                downlink_hz=shares_hz[1],
            )
            for user in users
        )
        line = scene.on(there).timeline(RoundPlan.sequential(turns))
        times[users, edge] = line.turn_end_s - line.turn_start_s
    return times
