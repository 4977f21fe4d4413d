"""SplitFed: every device trains a branch of its own, in parallel; both sides are averaged."""

from fedsplit.plan import RoundPlan
from fedsplit.schemes import Cut, CutRule, Scene, Scheme


class SplitFed(Scheme):
    """N branches of one device each.

    Parameters
    ----------
    cut : int, str or mapping
        Blocks on the device, or the scheme whose cuts are taken (`fedsplit.schemes.CutRule`).
    tail : int, optional
        Blocks on the device behind the server; the route then returns home and so the labels
        never leave the device.

    Notes
    -----
    C. Thapa et al., "SplitFed: When Federated Learning Meets Split Learning", AAAI 2022 (the
    variant that averages the server's side too), with LoRA adapters in place of whole segments.
    """

    def __init__(self, cut: Cut = 2, tail: int | None = None) -> None:
        self.cuts = CutRule(cut, tail)

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Give every device a branch of its own."""
        return RoundPlan.parallel(self.cuts.turns(scene, at_once=len(scene.devices)))
