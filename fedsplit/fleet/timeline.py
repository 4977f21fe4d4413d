"""When each activity of a round starts and ends on the modelled system, and what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.errors import require
from fedsplit.fleet.activities import Activity, expand, of_chores
from fedsplit.fleet.fleet import Fleet
from fedsplit.fleet.memory import device_memory_bytes, server_memory_bytes
from fedsplit.fleet.schedule import Schedule, repeated_blocks, schedule
from fedsplit.fleet.stages import CodecRatio, Group, SentBytes, StageBuilder
from fedsplit.fleet.steps import BACKHAUL, COMPUTE, DOWNLINK, UPLINK
from fedsplit.fleet.turns import Turns
from fedsplit.fleet.waves import AGGREGATE, Waves, averaging, read_waves
from fedsplit.measured import MeasuredProfile
from fedsplit.plan import RoundPlan
from fedsplit.profiles import ModelProfile
from fedsplit.wireless import ChannelState

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundCost:
    """What a round costs, per device ``[N]``, server ``[1 + edges]`` or edge ``[edges]``.

    Parameters
    ----------
    delay_s : float
        From the first activity to the end of aggregation.
    device_compute_s, uplink_s, downlink_s : ndarray
        Busy time of each device's processor and radio.
    server_compute_s : ndarray
        Work done by each server, in seconds at full speed.
    waiting_s : float
        Time that mini-batches spend in servers beyond their own work, over all branches.
    device_compute_j, device_transmit_j, server_compute_j, station_transmit_j : ndarray
        Energy. A station's transmitter belongs to the server that the radio link ends at.
    uplink_bytes, downlink_bytes, backhaul_bytes : ndarray
        Bytes over each device's radio link and each edge's wire (both ways together).
    device_memory_bytes, server_memory_bytes : ndarray
        Peak memory.
    """

    delay_s: float
    device_compute_s: Array
    uplink_s: Array
    downlink_s: Array
    server_compute_s: Array
    waiting_s: float
    device_compute_j: Array
    device_transmit_j: Array
    server_compute_j: Array
    station_transmit_j: Array
    uplink_bytes: Array
    downlink_bytes: Array
    backhaul_bytes: Array
    device_memory_bytes: Array
    server_memory_bytes: Array

    @property
    def device_energy_j(self) -> Array:
        """Energy of each device: computing and sending."""
        return self.device_compute_j + self.device_transmit_j

    @property
    def server_energy_j(self) -> Array:
        """Energy of each server: computing, and its station's transmitter."""
        return self.server_compute_j + self.station_transmit_j

    @property
    def energy_j(self) -> float:
        """Energy of everything together."""
        return float(self.device_energy_j.sum() + self.server_energy_j.sum())


@dataclass(frozen=True, eq=False, kw_only=True)
class Timeline:
    """A round on the modelled system.

    Parameters
    ----------
    cost : RoundCost
        Totals.
    turn_start_s, turn_end_s : ndarray
        When each turn starts and ends, branch by branch, shape ``[turns]``.
    branch_end_s : ndarray
        When each branch has its adapters, shape ``[branches]``.
    aggregation_s, aggregation_j : float
        Seconds and joules of the averaging that ends the round.
    """

    cost: RoundCost
    turn_start_s: Array
    turn_end_s: Array
    branch_end_s: Array
    aggregation_s: float
    aggregation_j: float
    _turns: Turns
    _waves: Waves
    _groups: tuple[Group, ...]
    _schedule: Schedule

    def turn_device_s(self) -> Array:
        """Return the seconds that each turn computes on its device, shape ``[turns]``."""
        seconds = np.zeros(len(self.turn_start_s))
        for group in self._groups:
            for block, repeats in repeated_blocks(group, self._turns):
                own = [s.kind == COMPUTE and not s.on_server for s in block.stages]
                busy = np.einsum("ms,msn->mn", repeats, block.work_s)
                seconds[group.members] += busy[:, own].sum(axis=1)
        return seconds

    @property
    def bands_hz(self) -> tuple[Array, Array]:
        """The bandwidth of each turn, up and down, shape ``[turns]``."""
        return self._turns.uplink_hz, self._turns.downlink_hz

    @property
    def n_activities(self) -> int:
        """How many activities there are in detail."""
        return sum(
            int(repeats.sum()) * len(block.stages)
            for group in self._groups
            for block, repeats in repeated_blocks(group, self._turns)
        ) + (len(self._waves.chores) + int(self.aggregation_s > 0))

    def activities(self, detail: bool = False) -> list[Activity]:
        """Return what happened when.

        Parameters
        ----------
        detail : bool
            False: one activity per turn and entity, from its first to its last; True: every
            activity of every mini-batch.
        """
        found = expand(self._turns, self._groups, self._schedule, detail)
        found += of_chores(self._waves, self._schedule)
        if self.aggregation_s > 0:
            start = self.cost.delay_s - self.aggregation_s
            found.append(
                Activity(
                    kind=AGGREGATE,
                    label="average adapters",
                    entity="server",
                    branch=-1,
                    turn=-1,
                    member=0,
                    step=-1,
                    start_s=start,
                    end_s=self.cost.delay_s,
                    busy_s=self.aggregation_s,
                    sent_bytes=0.0,
                    energy_j=self.aggregation_j,
                )
            )
        return found


def timeline(
    plan: RoundPlan,
    profile: ModelProfile,
    fleet: Fleet,
    channel: ChannelState | Sequence[ChannelState],
    batch_size: int,
    *,
    codec_ratio: CodecRatio | None = None,
    sent: SentBytes | None = None,
    measured: Mapping[str, MeasuredProfile] | None = None,
) -> Timeline:
    """Return when everything in a round happens and what it costs.

    A turn fetches the adapters of its device (and edge), trains its mini-batches one after the
    other along its route, and hands the adapters back. Branches run in parallel and meet only at
    shared servers (`Fleet.serving`); the radio is divided by frequency, so it never queues. The
    turns of a wave run in parallel too, and their adapters are averaged before the next wave; where
    an edge does that, they cross the backhaul before the first wave and after the last only. At
    the end the server averages the branches' adapters, if there are several.

    Parameters
    ----------
    plan : RoundPlan
        Branches, turns, routes, shares.
    profile : ModelProfile
        What the model costs, block by block.
    fleet : Fleet
        Who computes.
    channel : ChannelState or sequence of ChannelState
        The links during the round; of a sequence, state ``i`` holds for the ``i``-th step of every
        turn, and the last for all steps after it.
    batch_size : int
        Samples per mini-batch.
    codec_ratio : callable, optional
        Encoded over raw bytes for a mapping of codec settings; 1 by default.
    sent : mapping, optional
        Bytes that a run really sent, which replace the estimate of the hops it names.
    measured : mapping of str to MeasuredProfile, optional
        Times of tiers ("device", "edge", ...) whose machines were measured, in place of FLOPs.

    Raises
    ------
    FedsplitError
        If plan, profile, fleet and channel do not fit together, or a device has no coverage.
    """
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    states = (channel,) if isinstance(channel, ChannelState) else tuple(channel)
    require(len(states) > 0, "channel", "no states", "at least one state")
    for state in states:
        fits = state.n_devices == fleet.n_devices
        require(fits, "channel devices", state.n_devices, f"{fleet.n_devices}, as in the fleet")
    builder = StageBuilder(
        plan,
        profile,
        fleet,
        states,
        batch_size=batch_size,
        codec_ratio=codec_ratio,
        sent=sent,
        measured=measured,
    )
    turns, groups = builder.turns, builder.groups()
    waves = read_waves(plan, turns, groups, fleet)
    times = schedule(turns, waves, groups, fleet.serving, len(fleet.servers))
    adapters = profile.total().adapter_bytes
    aggregation_s, aggregation_j = averaging(adapters, len(plan.branches), fleet, 0)
    totals = _totals(turns, groups, fleet)
    for chore in waves.chores:
        if chore.kind == AGGREGATE:
            totals["server_compute_s"][chore.node] += chore.seconds
            totals["server_compute_j"][chore.node] += chore.joules
        else:
            totals["backhaul_bytes"][chore.node - 1] += chore.sent_bytes
    totals["server_compute_s"][0] += aggregation_s
    totals["server_compute_j"][0] += aggregation_j
    branch_end_s = np.zeros(len(plan.branches))
    np.maximum.at(branch_end_s, waves.branch, times.done_s + waves.after_s)
    cost = RoundCost(
        delay_s=float(branch_end_s.max()) + aggregation_s,
        waiting_s=times.waiting_s,
        device_memory_bytes=device_memory_bytes(groups, turns, batch_size, fleet.n_devices),
        server_memory_bytes=server_memory_bytes(
            groups, turns, profile=profile, batch_size=batch_size, fleet=fleet
        ),
        **totals,
    )
    return Timeline(
        cost=cost,
        turn_start_s=times.start_s,
        turn_end_s=times.end_s,
        branch_end_s=branch_end_s,
        aggregation_s=aggregation_s,
        aggregation_j=aggregation_j,
        _turns=turns,
        _waves=waves,
        _groups=groups,
        _schedule=times,
    )


def _totals(turns: Turns, groups: Sequence[Group], fleet: Fleet) -> dict[str, Array]:
    """Sum the stages of all turns by what they are charged to."""
    n, servers, edges = fleet.n_devices, len(fleet.servers), fleet.n_edges
    sizes = {
        "device_compute_s": n,
        "uplink_s": n,
        "downlink_s": n,
        "server_compute_s": servers,
        "device_compute_j": n,
        "device_transmit_j": n,
        "server_compute_j": servers,
        "station_transmit_j": servers,
        "uplink_bytes": n,
        "downlink_bytes": n,
        "backhaul_bytes": edges,
    }
    totals = {name: np.zeros(size) for name, size in sizes.items()}
    for group in groups:
        device, edge = turns.device[group.members], turns.edge[group.members]
        station = 1 + edge if edges else np.zeros_like(edge)
        for block, repeats in repeated_blocks(group, turns):
            busy = np.einsum("ms,msn->mn", repeats, block.work_s)
            joules = np.einsum("ms,msn->mn", repeats, block.joules)
            amount = repeats.sum(axis=1)[:, None] * block.sent
            for j, stage in enumerate(block.stages):
                charges: tuple[tuple[str, IntArray, Array], ...]
                if stage.kind == UPLINK:
                    charges = (
                        ("uplink_s", device, busy[:, j]),
                        ("device_transmit_j", device, joules[:, j]),
                        ("uplink_bytes", device, amount[:, j]),
                    )
                elif stage.kind == DOWNLINK:
                    charges = (
                        ("downlink_s", device, busy[:, j]),
                        ("station_transmit_j", station, joules[:, j]),
                        ("downlink_bytes", device, amount[:, j]),
                    )
                elif stage.kind == BACKHAUL:
                    charges = (("backhaul_bytes", edge, amount[:, j]),)
                elif stage.on_server:
                    charges = (
                        ("server_compute_s", block.node[:, j], busy[:, j]),
                        ("server_compute_j", block.node[:, j], joules[:, j]),
                    )
                else:
                    charges = (
                        ("device_compute_s", device, busy[:, j]),
                        ("device_compute_j", device, joules[:, j]),
                    )
                for name, owner, value in charges:
                    totals[name] += np.bincount(owner, value, minlength=sizes[name])
    return totals
