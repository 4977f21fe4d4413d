"""CARD: in every round a cut and a server clock for each device, for delay and server energy."""

from dataclasses import replace

from fedsplit.errors import require
from fedsplit.plan import RoundPlan, Route
from fedsplit.planning import CutCosts, devices_of, plan_card, server_of
from fedsplit.schemes import Scene, Scheme
from fedsplit.wireless import downlink_bps, uplink_bps


class Card(Scheme):
    """One branch of all devices in turn; the server runs each turn at a clock of its own.

    Minimises ``U = w D' + (1 - w) E'``, delay and server energy scaled to 0..1: the best clock in
    closed form, the cut by a scan. A device that is given all blocks trains without the server.

    Parameters
    ----------
    delay_weight : float
        w: 1 minimises delay alone, 0 the server's energy alone.
    min_cut : int
        Blocks that stay on the device at least: 1 keeps embeddings private, 0 allows any cut.
    jointly : bool
        Minimise one weighted sum over the whole round in place of each device's own.

    Notes
    -----
    Z. Li et al., "Cut Layer and Computing Resource Decision", arXiv 2412.00090, IEEE Networking
    Letters, 2025. `jointly` is an addition.
    """

    def __init__(
        self,
        delay_weight: float = 0.5,
        min_cut: int = 1,
        jointly: bool = False,
    ) -> None:
        require(0 <= delay_weight <= 1, "strategy.delay_weight", delay_weight, "0 to 1")
        require(min_cut >= 0, "strategy.min_cut", min_cut, "at least 0")
        self.delay_weight = delay_weight
        self.min_cut = min_cut
        self.jointly = jointly

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Choose every device's cut and clock on the channel of the round."""
        devices, channel, codec = scene.devices, scene.channel, scene.codec
        batch, n_blocks = scene.work.batch_size, scene.n_blocks
        costs = CutCosts.from_profile(scene.profile, batch, device_only=True).only(scene.cuts)
        steps = [scene.work.steps_for(count) for count in scene.samples.values()]
        plan = plan_card(
            costs.compressed(scene.codec_ratio(codec.uplink), scene.codec_ratio(codec.downlink)),
            devices_of(scene.fleet, steps, devices),
            uplink_bps(channel, channel.uplink_hz, devices),
            downlink_bps(channel, channel.downlink_hz, devices),
            server_of(scene.fleet),
            delay_weight=self.delay_weight,
            min_cut=self.min_cut,
            jointly=self.jointly,
        )
        return RoundPlan.sequential(
            replace(
                scene.turn(device, Route.at_cut(n_blocks, int(cut))),
                server_hz=float(clock_hz),
            )
            for device, cut, clock_hz in zip(devices, plan.cut, plan.server_hz, strict=True)
        )
