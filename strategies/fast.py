"""Fast AI model splitting: in every round each device is cut where its turn takes least time."""

from dataclasses import replace

from fedsplit.errors import require
from fedsplit.plan import RoundPlan, Route
from fedsplit.planning import CutCosts, InfeasibleError, devices_of, fastest_cuts
from fedsplit.schemes import Scene, Scheme
from fedsplit.wireless import downlink_bps, uplink_bps


class Fast(Scheme):
    """One branch of all devices in turn, each cut anew on the rates of the round.

    The cut is a minimum s-t cut of the model, found by a scan of its chain of blocks: what a turn
    costs on the device, on the server and on the radio link, adapters included. If nothing is
    gained by the server, the device keeps the whole model.

    Parameters
    ----------
    min_blocks : int
        Privacy floor: blocks that stay on the device at least.
    device_memory_bytes : float, optional
        Memory that a device's part may need; by default what the fleet says of each device.

    Notes
    -----
    Z. Li et al., "Fast AI Model Splitting over Edge Networks", arXiv 2507.01041, 2025; the memory
    limit, the privacy floor and the codec are additions.
    """

    def __init__(
        self,
        min_blocks: int = 1,
        device_memory_bytes: float | None = None,
    ) -> None:
        require(min_blocks >= 0, "strategy.min_blocks", min_blocks, "at least 0")
        memory = device_memory_bytes
        allowed = "null or above 0"
        require(memory is None or memory > 0, "strategy.device_memory_bytes", memory, allowed)
        self.min_blocks = min_blocks
        self.device_memory_bytes = device_memory_bytes

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Find each device's best cut with the whole band to itself."""
        fleet, channel, codec = scene.fleet, scene.channel, scene.codec
        devices, n_blocks, floor = scene.devices, scene.n_blocks, self.min_blocks
        if floor > n_blocks:
            raise InfeasibleError(f"min_blocks of {scene.profile.name}", floor, n_blocks, "blocks")
        costs = CutCosts.from_profile(scene.profile, scene.work.batch_size, device_only=True)
        steps = [scene.work.steps_for(count) for count in scene.samples.values()]
        members = devices_of(fleet, steps, devices)
        if self.device_memory_bytes is not None:
            members = replace(members, memory_bytes=self.device_memory_bytes)
        cuts = fastest_cuts(
            costs.only(scene.cuts).compressed(
                scene.codec_ratio(codec.uplink), scene.codec_ratio(codec.downlink)
            ),
            members,
            uplink_bps(channel, channel.uplink_hz, devices),
            downlink_bps(channel, channel.downlink_hz, devices),
            float(fleet.servers.flops[0]),
            min_cut=floor,
        )
        return RoundPlan.sequential(
            scene.turn(device, Route.at_cut(n_blocks, int(cut)))
            for device, cut in zip(devices, cuts, strict=True)
        )
