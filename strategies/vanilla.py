"""Vanilla split learning: one branch; the devices train it in turn, each from the last one's."""

from fedsplit.plan import RoundPlan
from fedsplit.schemes import Scene

from .splitfed import SplitFed


class Vanilla(SplitFed):
    """One branch of all devices. Parameters are those of `SplitFed`.

    Notes
    -----
    O. Gupta, R. Raskar, "Distributed learning of deep neural network over multiple agents",
    Journal of Network and Computer Applications, 2018.
    """

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Put all devices in one branch, in the order of their index."""
        return RoundPlan.sequential(self.cuts.turns(scene))
