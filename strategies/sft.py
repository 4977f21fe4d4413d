"""SFT: all devices in parallel, cut and compression planned once in a while, spectrum every round.

The large timescale chooses the cut that all devices share and each device's compression on the
mean channel; the small one divides the band on the channel of the round.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedsplit.assets import default_codec_table
from fedsplit.errors import require, require_choice
from fedsplit.plan import CodecPlan, RoundPlan, Route
from fedsplit.planning import (
    CodecTable,
    CutCosts,
    SftPlan,
    SftProblem,
    devices_of,
    downlink_efficiency,
    plan_large_timescale,
    plan_large_timescale_alm,
    plan_small_timescale,
    uplink_snr_hz,
)
from fedsplit.schemes import Scene, Scheme
from fedsplit.wireless import ChannelState

SOLVERS = ("exact", "alm")
BANDWIDTHS = ("exact", "sqp", "equal")
SHIPPED = "package:default"


class Sft(Scheme):
    """N branches of one device each; both sides are averaged.

    Parameters
    ----------
    cut : int, optional
        Blocks on every device; by default planned, within all devices' memory.
    codec_table : str, optional
        Measured codec settings to choose from: "package:default" for those that ship, a CSV file
        of `fedsplit.planning.CodecTable`, or None to use the configured codec as it is.
    max_loss_increase : float
        How much the loss may rise by compression, in nats, averaged over the data of all devices.
    compress_gradients : bool
        Whether gradients are compressed with a device's setting too; else by the configured
        downlink codec. The authors' runs do not.
    min_cut : int
        Blocks that stay on a device at least, where the cut is planned.
    solver : str
        For the large timescale: "exact", or "alm", the paper's augmented Lagrangian.
    bandwidth : str
        For the small timescale: "exact", "sqp", the paper's, or "equal" shares.
    large_period : int, optional
        Rounds for which a large-timescale plan holds; by default, all.

    Notes
    -----
    S. Zhang et al., "Split Fine-Tuning for Large Language Models in Wireless Networks", arXiv
    2501.09237, IEEE JSTSP 2025.
    """

    def __init__(
        self,
        cut: int | None = None,
        *,
        codec_table: str | None = SHIPPED,
        max_loss_increase: float = 0.05,
        compress_gradients: bool = False,
        min_cut: int = 1,
        solver: str = "exact",
        bandwidth: str = "exact",
        large_period: int | None = None,
    ) -> None:
        require_choice("strategy.solver", solver, SOLVERS)
        require_choice("strategy.bandwidth", bandwidth, BANDWIDTHS)
        allowed = "null or at least 1"
        valid = large_period is None or large_period >= 1
        require(valid, "strategy.large_period", large_period, allowed)
        self.cut = cut
        self.max_loss_increase = max_loss_increase
        self.compress_gradients = compress_gradients
        self.min_cut = min_cut
        self.solver = solver
        self.bandwidth = bandwidth
        self.large_period = large_period
        file = default_codec_table() if codec_table == SHIPPED else codec_table
        self._table = None if file is None else CodecTable.read_csv(file)

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Divide the band for this round; cut and compression are those of its frame."""
        large = self.plan_frame(scene)
        route = Route.two_tier(scene.n_blocks, large.cut)
        turns = [
            replace(scene.turn(device, route), codec=self._codec(scene, large, device))
            for device in scene.devices
        ]
        if self.bandwidth == "equal":
            return RoundPlan.parallel(turns)
        here = self._problem(scene, scene.devices, scene.channel, list(scene.samples.values()))
        ratio = large.ratio[list(scene.devices)]
        shares = plan_small_timescale(here, large.cut, ratio, method=self.bandwidth).shares
        return RoundPlan.parallel(
            replace(turn, uplink_hz=float(uplink_hz), downlink_hz=float(downlink_hz))
            for turn, uplink_hz, downlink_hz in zip(turns, *shares, strict=True)
        )

    def plan_frame(self, scene: Scene) -> SftPlan:
        """Return the large-timescale plan that holds in the round of `scene`, for all devices.

        It is made on the mean channel of the first round that it holds for, and of the data of all
        devices, so every round of a frame, and a run that is resumed in it, finds the same plan,
        whoever takes part.
        """
        round_, period = scene.server_round, self.large_period
        first = 1 if period is None else round_ - (round_ - 1) % period
        everyone = range(scene.fleet.n_devices)
        data = scene.fleet.samples.tolist()
        problem = self._problem(scene, everyone, scene.mean_channel(first), data)
        if self.solver == "alm":
            return plan_large_timescale_alm(problem).plan
        return plan_large_timescale(problem)

    def _problem(
        self, scene: Scene, devices: Sequence[int], channel: ChannelState, samples: Sequence[int]
    ) -> SftProblem:
        which = np.array(devices)
        steps = [scene.work.steps_for(count) for count in samples]
        costs = CutCosts.from_profile(scene.profile, scene.work.batch_size)
        if self.cut is None:
            costs = costs.only(scene.cuts)
        downlink_ratio = 1.0 if self.compress_gradients else scene.codec_ratio(scene.codec.downlink)
        server, sharing = scene.fleet.servers, scene.fleet.serving.discipline != "unlimited"
        return SftProblem(
            costs=costs.compressed(1.0, downlink_ratio),
            devices=devices_of(scene.fleet, steps, devices),
            table=self._settings(scene),
            max_loss_increase=self.max_loss_increase,
            uplink_snr_hz=uplink_snr_hz(channel)[which],
            downlink_efficiency=downlink_efficiency(channel)[which],
            uplink_hz=channel.uplink_hz,
            downlink_hz=channel.downlink_hz,
            server_flops_per_s=float(server.flops[0]) / (len(which) if sharing else 1),
            data_weights=samples,
            compress_gradients=self.compress_gradients,
            min_cut=self.min_cut if self.cut is None else self.cut,
            # The server keeps a block at least.
            max_cut=scene.n_blocks - 1 if self.cut is None else self.cut,
        )

    def _settings(self, scene: Scene) -> CodecTable:
        if self._table is not None:
            return self._table.at(scene.profile.itemsize)
        configured = scene.codec.uplink
        ratio = np.array([scene.codec_ratio(configured)])
        return CodecTable(ratio, np.zeros(1), (configured,), scene.profile.itemsize)

    def _codec(self, scene: Scene, large: SftPlan, device: int) -> CodecPlan:
        settings = large.table.settings[large.setting[device]]
        return CodecPlan(settings, settings if self.compress_gradients else scene.codec.downlink)
