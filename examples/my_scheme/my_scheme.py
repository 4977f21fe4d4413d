"""A scheme of your own: the faster a device, the more blocks it keeps."""

from flwr.serverapp.strategy import Strategy

from fedsplit.errors import require
from fedsplit.flower import Scene, SplitStrategy
from fedsplit.plan import RoundPlan, Route


class MyScheme(SplitStrategy):
    """N branches of one device each, cut by speed.

    Parameters
    ----------
    share : float
        Part of the model that the fastest device keeps, from 0 to 1.
    inner : Strategy, optional
        The Flower strategy that samples devices and aggregates.
    """

    def __init__(self, share: float = 0.5, inner: Strategy | None = None) -> None:
        super().__init__(inner)
        require(0 <= share <= 1, "strategy.share", share, "from 0 to 1")
        self.share = share

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Cut each device's model in proportion to its speed; one block stays on both sides."""
        speed = scene.fleet.devices.flops
        blocks = self.share * scene.n_blocks * speed / speed.max()
        cuts = blocks.round().astype(int).clip(1, scene.n_blocks - 1)
        return RoundPlan.parallel(
            scene.turn(device, Route.two_tier(scene.n_blocks, int(cuts[device])))
            for device in scene.devices
        )
