"""A scheme of your own: the faster a device, the more blocks it keeps."""

from fedsplit.errors import require
from fedsplit.plan import RoundPlan, Route
from fedsplit.schemes import Scene, Scheme


class MyScheme(Scheme):
    """N branches of one device each, cut by speed.

    Parameters
    ----------
    share : float
        Part of the model that the fastest device keeps, from 0 to 1.
    """

    def __init__(self, share: float = 0.5) -> None:
        require(0 <= share <= 1, "strategy.share", share, "from 0 to 1")
        self.share = share

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Cut each device's model in proportion to its speed; one block stays on both sides."""
        speed = scene.fleet.devices.flops
        blocks = self.share * scene.n_blocks * speed / speed.max()
        cuts = blocks.round().astype(int).clip(1, scene.n_blocks - 1)
        routes = [Route.two_tier(scene.n_blocks, int(cut)) for cut in cuts]
        return RoundPlan.parallel(scene.turn(device, routes[device]) for device in scene.devices)
