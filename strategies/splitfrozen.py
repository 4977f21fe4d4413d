"""SplitFrozen: SplitFed whose devices train nothing, so that each boundary is sent once."""

from dataclasses import replace

from fedsplit.plan import RoundPlan
from fedsplit.schemes import Cut, CutRule, Scene, Scheme


class SplitFrozen(Scheme):
    """N branches of one device each, whose blocks only infer; the server trains the rest.

    Parameters
    ----------
    cut : int, str or mapping
        Blocks on the device, or the scheme whose cuts are taken (`fedsplit.schemes.CutRule`).

    Notes
    -----
    "SplitFrozen", arXiv 2503.18986, has the devices' layers frozen and the server's trained; that
    what a sample is at the cut is kept by the server is our own.
    """

    def __init__(self, cut: Cut = 2) -> None:
        self.cuts = CutRule(cut)

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Give every device a branch of its own."""
        turns = self.cuts.turns(scene, at_once=len(scene.devices))
        return RoundPlan.parallel(replace(turn, frozen=True) for turn in turns)
