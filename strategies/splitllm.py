"""SplitLLM: users, edges and a cloud; in every round one user of each edge trains."""

from dataclasses import replace

from flwr.serverapp.strategy import Strategy

from fedsplit.errors import require, require_choice
from fedsplit.flower import Scene, SplitStrategy
from fedsplit.plan import CLOUD, DEVICE, EDGE, RoundPlan, Route
from fedsplit.planning import select_users
from fedsplit.planning.association import RULES


class SplitLlm(SplitStrategy):
    """K branches of one user each, over its own edge server to the cloud.

    The servers hold K branches at a time instead of one for each user, which saves the memory; a
    pass over all N users takes ``ceil(N / K)`` rounds, which is what it costs.

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
    inner : Strategy, optional
        The Flower strategy that samples the users to choose from and aggregates; FedAvg over all
        by default.

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
        selection: str = "round_robin",
        inner: Strategy | None = None,
    ) -> None:
        super().__init__(inner)
        require_choice("strategy.selection", selection, RULES)
        self.device_cut = device_cut
        self.edge_cut = edge_cut
        self.tail = tail
        self.selection = selection

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Choose a user of every edge that has any."""
        require(scene.fleet.n_edges > 0, "fleet.edges", 0, "at least 1 for strategy=splitllm")
        route = self.route(scene.n_blocks)
        home = scene.fleet.home[list(scene.devices)]
        chosen = select_users(home, scene.server_round - 1, scene.seed, self.selection)
        return RoundPlan.parallel(
            replace(scene.turn(scene.devices[place], route), edge=int(home[place]))
            for place in chosen
        )

    def route(self, n_blocks: int) -> Route:
        """Return the route of every user through a model of `n_blocks` blocks."""
        cuts, tiers = [self.device_cut], [DEVICE, EDGE]
        if self.edge_cut is not None:
            cuts, tiers = [*cuts, self.edge_cut], [*tiers, CLOUD]
        if self.tail is not None:
            cuts, tiers = [*cuts, n_blocks - self.tail], [*tiers, DEVICE]
        return Route.through(n_blocks, cuts, tiers)
