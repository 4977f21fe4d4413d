"""FedLoRA: the federated baseline; every device holds and trains the whole model."""

from fedsplit.plan import RoundPlan, Route
from fedsplit.schemes import Scene, Scheme


class FedLora(Scheme):
    """N branches of one device each, on a route that never leaves the device.

    Notes
    -----
    B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", AISTATS 2017, on LoRA adapters.
    """

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Keep the whole model on every device."""
        route = Route.device_only(scene.n_blocks)
        return RoundPlan.parallel(scene.turn(device, route) for device in scene.devices)
