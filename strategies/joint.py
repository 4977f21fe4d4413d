"""Joint: in every round a cut, band, codec, rank, clock and power of its own for each device."""

from dataclasses import replace

import numpy as np

from fedsplit.arrays import Array
from fedsplit.assets import default_codec_table
from fedsplit.errors import require, require_choice
from fedsplit.plan import CodecPlan, RoundPlan, Route
from fedsplit.planning import (
    CodecTable,
    CutCosts,
    InfeasibleError,
    SftProblem,
    Way,
    WeightedProblem,
    devices_of,
    downlink_efficiency,
    plan_joint,
    plan_weighted,
    server_of,
    uplink_snr_hz,
    ways_to_train,
)
from fedsplit.planning.weighted_problem import LEAST_POWER
from fedsplit.schemes import Scene, Scheme

from .sft import SHIPPED

GOALS = ("delay", "energy", "weighted")
ALONE = ("partition", "unlimited")
"""Disciplines under which no branch waits for another's work on the server."""
_SEARCH = 2_000
"""Plans looked at in the exact search, at most: a second or so."""


class Joint(Scheme):
    """N branches of one device each, planned together for delay, energy or both.

    fedsplit's own scheme. Without a budget, the goal "delay" is the problem of SFT, but every
    device has a cut and a codec setting of its own, the server's speed is divided along with the
    bands, and all is planned anew on each round's channel. The server's queue divides it then.
    If the table has them, each device also gets a rank, and trains its blocks or only infers, as
    its memory allows and within the same limit on the loss. A boundary counts as sent in every
    round: others train the blocks before it meanwhile. Small rounds are planned exactly.

    The other goals choose cut, clock, transmit power and band of each device and the clock of the
    server (`fedsplit.planning.plan_weighted`, certified to 1 %), with the same codec setting for
    all: of those within the limit the one that sends least.

    Parameters
    ----------
    goal : str
        "delay", "energy", or "weighted": energy of everything and `delay_weight` times delay.
    delay_weight : float
        Joules that a second is worth with the goal "weighted", W.
    budget_j : float, optional
        Joules that each device may spend in a round, on average over all rounds. What it spent
        beyond that (`Scene.spent_j`) raises the price of its energy: a virtual queue.
    codec_table : str, optional
        Measured settings to choose from, of codecs, ranks and frozen devices: "package:default" for
        those that ship (codecs), a CSV file of ``fedsplit calibrate``, or None to use the
        configured codec as it is.
    max_loss_increase : float
        Limit on the rise of the loss, averaged over the devices' data.
    compress_gradients : bool
        Whether gradients use the setting chosen for activations, in place of the configured one.
    min_cut : int
        Blocks that stay on a device at least.
    """

    def __init__(
        self,
        goal: str = "delay",
        delay_weight: float = 1.0,
        budget_j: float | None = None,
        codec_table: str | None = SHIPPED,
        max_loss_increase: float = 0.05,
        compress_gradients: bool = False,
        min_cut: int = 1,
    ) -> None:
        require_choice("strategy.goal", goal, GOALS)
        require(0 <= delay_weight < np.inf, "strategy.delay_weight", delay_weight, "at least 0")
        valid = budget_j is None or 0 < budget_j < np.inf
        require(valid, "strategy.budget_j", budget_j, "null or finite and above 0")
        limit = max_loss_increase
        require(0 <= limit < np.inf, "strategy.max_loss_increase", limit, "finite and at least 0")
        require(min_cut >= 0, "strategy.min_cut", min_cut, "at least 0")
        file = default_codec_table() if codec_table == SHIPPED else codec_table
        self.table = None if file is None else CodecTable.read_csv(file)
        chooses = self.table is not None and bool(self.table.ranks or self.table.frozen)
        alone = goal == "delay" and budget_j is None
        allowed = "delay, without a budget, where strategy.codec_table has ranks or frozen devices"
        require(alone or not chooses, "strategy.goal", goal, allowed)
        self._chooses = chooses
        self.goal = goal
        self.delay_weight = {"delay": 1.0, "energy": 0.0, "weighted": delay_weight}[goal]
        self.budget_j = budget_j
        self.max_loss_increase = max_loss_increase
        self.compress_gradients = compress_gradients and self.table is not None
        self.min_cut = min_cut

    def plan_round(self, scene: Scene) -> RoundPlan:
        """Plan everything for the channel of the round."""
        problem = self._problem(scene)
        if self.goal != "delay" or self.budget_j is not None:
            return self._weighted(scene, problem)
        ways = self._ways(scene, problem) if self._chooses else ()
        plan = plan_joint(
            problem,
            ways,
            divide_server=scene.fleet.serving.discipline not in ALONE,
            search=_SEARCH if ways else 0,
        )
        taken = [plan.ways[way] for way in plan.way]
        return RoundPlan.parallel(
            replace(
                scene.turn(device, Route.at_cut(scene.n_blocks, int(plan.cut[i]))),
                codec=self._codec(scene, plan.table, int(plan.setting[i])),
                uplink_hz=float(plan.uplink_hz[i]),
                downlink_hz=float(plan.downlink_hz[i]),
                **({"rank": taken[i].rank, "frozen": taken[i].frozen} if ways else {}),
            )
            for i, device in enumerate(scene.devices)
        )

    def _ways(self, scene: Scene, problem: SftProblem) -> tuple[Way, ...]:
        """Return the ways to train that the table has."""
        fixed = scene.work.ranks
        require(
            not (fixed and problem.table.ranks),
            "model.r_by_device",
            dict(fixed),
            "null, strategy.codec_table has ranks to choose from",
        )
        fresh = [
            scene.work.fresh(count, scene.work.steps_for(count), 1)
            for count in scene.samples.values()
        ]
        batch = scene.work.batch_size
        return ways_to_train(problem.costs, scene.profile, batch, problem.table, fresh)

    def _weighted(self, scene: Scene, problem: SftProblem) -> RoundPlan:
        """Plan clocks and powers too, with one codec setting for all."""
        table, limit = problem.table, problem.loss_limit
        within = np.flatnonzero(table.loss_increase <= limit)
        if not len(within):
            least = table.loss_increase.min()
            raise InfeasibleError("loss increase of any setting", least, limit, "nats")
        setting = int(within[table.ratio[within].argmin()])
        ratio = table.ratio[setting]
        weighted = self._weighted_problem(
            scene,
            problem,
            problem.costs.compressed(ratio, ratio if self.compress_gradients else 1.0),
        )
        plan, state = plan_weighted(weighted), scene.channel
        return RoundPlan.parallel(
            replace(
                scene.turn(device, Route.at_cut(scene.n_blocks, int(plan.cut[i]))),
                codec=self._codec(scene, table, setting),
                uplink_hz=float(plan.share[i]) * state.uplink_hz,
                downlink_hz=float(plan.share[i]) * state.downlink_hz,
                server_hz=plan.server_hz,
                device_hz=float(plan.device_hz[i]),
                uplink_w=float(plan.uplink_w[i]),
            )
            for i, device in enumerate(scene.devices)
        )

    def _weighted_problem(
        self, scene: Scene, problem: SftProblem, costs: CutCosts
    ) -> WeightedProblem:
        which, state, machines = np.array(scene.devices), scene.channel, scene.fleet.devices
        discipline = scene.fleet.serving.discipline
        joule_weight = 0.0 if self.goal == "delay" else 1.0
        urgency: Array = np.zeros(len(which))
        if self.budget_j is not None and scene.spent_j is not None:
            allowed_j = self.budget_j * (scene.server_round - 1)
            urgency = np.maximum(scene.spent_j[which] - allowed_j, 0.0) / self.budget_j
        return WeightedProblem(
            costs=costs,
            devices=problem.devices,
            clock_hz=machines.clock_hz[which],
            min_hz=machines.min_hz[which],
            energy_coefficient=machines.energy_coefficient[which],
            power_w=state.power_up_w[which],
            uplink_snr_hz=problem.uplink_snr_hz,
            # A table of modulation schemes has a weakest signal: there power is not for sale.
            power_range=LEAST_POWER if state.rate == "shannon" else 1.0,
            downlink_efficiency=problem.downlink_efficiency,
            uplink_hz=state.uplink_hz,
            downlink_hz=state.downlink_hz,
            power_down_w=state.power_down_w,
            server=server_of(scene.fleet),
            server_share={"partition": 1 / len(which), "unlimited": 1.0}.get(discipline),
            device_weight=joule_weight + (joule_weight + self.delay_weight) * urgency,
            joule_weight=joule_weight,
            second_weight=self.delay_weight,
            min_cut=self.min_cut,
        )

    def _problem(self, scene: Scene) -> SftProblem:
        devices, channel, ratio = np.array(scene.devices), scene.channel, scene.codec_ratio
        costs = CutCosts.from_profile(scene.profile, scene.work.batch_size, device_only=True)
        costs = costs.only(scene.cuts)
        if not self.compress_gradients:
            costs = costs.compressed(1.0, ratio(scene.codec.downlink))
        sharing = 1 if scene.fleet.serving.discipline == "unlimited" else len(devices)
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
            server_flops_per_s=float(scene.fleet.servers.flops[0]) / sharing,
            data_weights=list(scene.samples.values()),
            compress_gradients=self.compress_gradients,
            min_cut=self.min_cut,
        )

    def _codec(self, scene: Scene, table: CodecTable, setting: int) -> CodecPlan:
        chosen = table.settings[setting]
        return CodecPlan(chosen, chosen if self.compress_gradients else scene.codec.downlink)
