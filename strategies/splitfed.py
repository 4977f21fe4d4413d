"""SplitFed: every device trains a branch of its own, in parallel; both sides are averaged."""

from flwr.serverapp.strategy import Strategy

from fedsplit.flower import Scene, SplitStrategy
from fedsplit.plan import RoundPlan, Route


class SplitFed(SplitStrategy):
    """N branches of one device each.

    Parameters
    ----------
    cut : int
        Blocks on the device.
    tail : int, optional
        Blocks on the device behind the server; the route then returns home and so the labels
        never leave the device.
    inner : Strategy, optional
        The Flower strategy that samples devices and aggregates; FedAvg by default.

    Notes
    -----
    C. Thapa et al., "SplitFed: When Federated Learning Meets Split Learning", AAAI 2022 (the
    variant that averages the server's side too), with LoRA adapters in place of whole segments.
    """

    def __init__(
        self, cut: int = 2, tail: int | None = None, inner: Strategy | None = None
    ) -> None:
        super().__init__(inner)
        self.cut = cut
        self.tail = tail

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Give every device a branch of its own."""
        route = Route.split(scene.n_blocks, self.cut, self.tail)
        return RoundPlan.parallel(scene.turn(device, route) for device in scene.devices)
