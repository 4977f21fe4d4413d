"""CPSL: clusters of devices one after the other, the devices of a cluster in parallel."""

import numpy as np

from fedsplit.errors import require, require_choice
from fedsplit.plan import RoundPlan
from fedsplit.schemes import Cut, CutRule, Scene, Scheme
from fedsplit.seeds import generator

from .gsfl import turn_times_s

CLUSTERINGS = ("similar", "random")


class Cpsl(Scheme):
    """One cluster per round, a branch for each of its devices; clusters take turns.

    A cluster starts from what the cluster before it left after averaging, so a round of Flower is
    one cluster and a pass over all devices takes `clusters` rounds. Both sides of the model are
    trained.

    Parameters
    ----------
    clusters : int
        Number of clusters, at most as many as devices.
    cut : int, str or mapping
        Blocks on the device, or the scheme whose cuts are taken (`fedsplit.schemes.CutRule`).
    tail : int, optional
        Blocks on the device behind the server; labels then never leave the device.
    clustering : str
        "similar": devices whose turns take equally long, on the mean channel of round 1, so that
        nobody waits for a straggler; "random": drawn anew for every pass.

    Notes
    -----
    W. Wu et al., "Split Learning over Wireless Networks: Parallel Design and Resource Management",
    IEEE JSAC 2023, arXiv 2204.08119.
    """

    def __init__(
        self,
        clusters: int = 2,
        cut: Cut = 2,
        tail: int | None = None,
        clustering: str = "similar",
    ) -> None:
        require_choice("strategy.clustering", clustering, CLUSTERINGS)
        self.clusters = clusters
        self.cuts = CutRule(cut, tail)
        self.clustering = clustering

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Let the cluster train whose turn it is."""
        most = scene.fleet.n_devices
        require(
            1 <= self.clusters <= most, "strategy.clusters", self.clusters, f"1 to {most} devices"
        )
        clusters = min(self.clusters, len(scene.devices))
        pass_, place = divmod(scene.server_round - 1, clusters)
        cluster = np.array_split(self._order(scene, pass_, clusters), clusters)[place]
        turns = self.cuts.turns(scene, at_once=len(cluster))
        return RoundPlan.parallel(turn for turn in turns if turn.device in cluster)

    def _order(self, scene: Scene, pass_: int, clusters: int) -> np.ndarray:
        """Return the devices by time, slowest first, or shuffled; neighbours share a cluster."""
        devices = np.array(scene.devices)
        if self.clustering == "random":
            return generator(scene.seed, "clusters", pass_).permutation(devices)
        # What does not change from round to round, or somebody would be in two clusters of a pass.
        mean, at_once = scene.on(scene.mean_channel(1)), -(-len(devices) // clusters)
        times_s = turn_times_s(mean, self.cuts.turns(mean, at_once), at_once)
        return devices[np.argsort(-times_s, kind="stable")]
