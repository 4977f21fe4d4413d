"""Joint: in every round a cut, codec, band and server share of its own for each device."""

from dataclasses import replace

import numpy as np

from fedsplit.assets import default_codec_table
from fedsplit.errors import require
from fedsplit.plan import CodecPlan, RoundPlan, Route
from fedsplit.planning import (
    CodecTable,
    CutCosts,
    SftProblem,
    devices_of,
    downlink_efficiency,
    plan_joint,
    uplink_snr_hz,
)
from fedsplit.schemes import Scene, Scheme

from .sft import SHIPPED


class Joint(Scheme):
    """N branches of one device each, for the shortest round that a limit on the loss allows.

    fedsplit's own scheme: the problem of SFT, but every device has a cut and a codec setting of
    its own, the server's speed is divided along with the bands, and all is planned anew on each
    round's channel. Server shares become clocks where branches do not contend for the server
    (``fleet.serving.discipline=unlimited``); elsewhere its queue divides the server.

    Parameters
    ----------
    codec_table : str, optional
        Measured codec settings to choose from: "package:default" for those that ship, a CSV file
        of ``fedsplit calibrate``, or None to use the configured codec as it is.
    max_loss_increase : float
        Limit on the rise of the loss, averaged over the devices' data.
    compress_gradients : bool
        Whether gradients use the setting chosen for activations, in place of the configured one.
    min_cut : int
        Blocks that stay on a device at least.
    """

    def __init__(
        self,
        codec_table: str | None = SHIPPED,
        max_loss_increase: float = 0.05,
        compress_gradients: bool = False,
        min_cut: int = 1,
    ) -> None:
        limit = max_loss_increase
        require(0 <= limit < np.inf, "strategy.max_loss_increase", limit, "finite and at least 0")
        require(min_cut >= 0, "strategy.min_cut", min_cut, "at least 0")
        file = default_codec_table() if codec_table == SHIPPED else codec_table
        self.table = None if file is None else CodecTable.read_csv(file)
        self.max_loss_increase = max_loss_increase
        self.compress_gradients = compress_gradients and self.table is not None
        self.min_cut = min_cut

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Plan everything for the channel of the round."""
        plan = plan_joint(self._problem(scene))
        unlimited = scene.fleet.serving.discipline == "unlimited"
        clock_hz = plan.server_flops_per_s / scene.fleet.servers.flops_per_cycle[0]
        return RoundPlan.parallel(
            replace(
                scene.turn(device, Route.at_cut(scene.n_blocks, int(plan.cut[i]))),
                codec=self._codec(scene, plan.table, int(plan.setting[i])),
                uplink_hz=float(plan.uplink_hz[i]),
                downlink_hz=float(plan.downlink_hz[i]),
                server_hz=float(clock_hz[i]) if unlimited and clock_hz[i] > 0 else None,
            )
            for i, device in enumerate(scene.devices)
        )

    def _problem(self, scene: Scene) -> SftProblem:
        devices, channel, ratio = np.array(scene.devices), scene.channel, scene.codec_ratio
        costs = CutCosts.from_profile(scene.profile, scene.work.batch_size, device_only=True)
        costs = costs.only(scene.cuts)
        if not self.compress_gradients:
            costs = costs.compressed(1.0, ratio(scene.codec.downlink))
        configured, itemsize = scene.codec.uplink, scene.profile.itemsize
        if self.table is None:
            table = CodecTable(np.array([ratio(configured)]), np.zeros(1), (configured,), itemsize)
        else:
            table = self.table.at(itemsize)
        return SftProblem(
            costs=costs,
            devices=devices_of(
                scene.fleet,
                [scene.work.steps_for(count) for count in scene.samples.values()],
                scene.devices,
            ),
            table=table,
            max_loss_increase=self.max_loss_increase,
            uplink_snr_hz=uplink_snr_hz(channel)[devices],
            downlink_efficiency=downlink_efficiency(channel)[devices],
            uplink_hz=channel.uplink_hz,
            downlink_hz=channel.downlink_hz,
            server_flops_per_s=float(scene.fleet.servers.flops[0]) / len(devices),
            data_weights=list(scene.samples.values()),
            compress_gradients=self.compress_gradients,
            min_cut=self.min_cut,
        )

    def _codec(self, scene: Scene, table: CodecTable, setting: int) -> CodecPlan:
        chosen = table.settings[setting]
        return CodecPlan(chosen, chosen if self.compress_gradients else scene.codec.downlink)
