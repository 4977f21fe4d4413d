"""From a plan to the stages of each turn: what runs where, for how long, with how many bytes.

Turns whose routes visit the same tiers have the same stages and are costed together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.errors import FedsplitError, require
from fedsplit.fleet.cost import compute_delay_s, compute_energy_j, transmit_energy_j
from fedsplit.fleet.fleet import Fleet
from fedsplit.fleet.steps import BACKHAUL, COMPUTE, DOWNLINK, UPLINK, Stage, step_stages
from fedsplit.fleet.turns import CostTable, read_turns
from fedsplit.measured import MeasuredProfile
from fedsplit.pace import Pace
from fedsplit.plan import DEVICE, EDGE, AdapterWay, RoundPlan
from fedsplit.profiles import ModelProfile
from fedsplit.wireless import ChannelState, downlink_bps, uplink_bps

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

CodecRatio = Callable[[Mapping[str, object]], float]
"""Encoded bytes over raw bytes that a codec with these settings is expected to reach."""

SentBytes = Mapping[tuple[int, int, int], tuple[float, float]]
"""Bytes really sent: (branch, turn of the branch, hop of the route) -> (forward, backward)."""


@dataclass(frozen=True, eq=False)
class Block:
    """The same stages for several turns.

    Parameters
    ----------
    stages : tuple of Stage
        Columns.
    node : ndarray of int
        Server that computes each stage, -1 elsewhere, shape ``[M, stages]``.
    work_s : ndarray
        Seconds at full speed, shape ``[M, states, stages]``.
    sent : ndarray
        Bytes over the link of each stage, shape ``[M, stages]``.
    joules : ndarray
        Energy, shape ``[M, states, stages]``.
    """

    stages: tuple[Stage, ...]
    node: IntArray
    work_s: Array
    sent: Array
    joules: Array


@dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """Turns whose routes visit the same tiers, and whose adapters come from the same place.

    Parameters
    ----------
    members : ndarray of int
        Their indices in `Turns`, shape ``[M]``.
    tiers : tuple of str
        The tiers visited.
    at_edge : bool
        Whether their adapters stay at an edge between waves.
    starts, stops : ndarray of int
        Blocks of each segment, shape ``[M, segments]``.
    adapter_bytes : ndarray
        Of each turn's rank, shape ``[M, segments]``.
    costs : CostTable
        What their model costs, with what is beside its adapters.
    share, frozen : ndarray
        Size of adapters beside the whole rank's; whether the device only infers; shape ``[M]``.
    before, step, after : Block
        Adapters in, one mini-batch, adapters out.
    pace : Pace
        Which mini-batches are under way together.
    """

    members: IntArray
    tiers: tuple[str, ...]
    at_edge: bool
    starts: IntArray
    stops: IntArray
    adapter_bytes: Array
    costs: CostTable
    share: Array
    frozen: BoolArray
    before: Block
    step: Block
    after: Block
    pace: Pace


class StageBuilder:
    """Costs the stages of every turn of a round."""

    def __init__(
        self,
        plan: RoundPlan,
        profile: ModelProfile,
        fleet: Fleet,
        states: Sequence[ChannelState],
        *,
        batch_size: int,
        codec_ratio: CodecRatio | None,
        sent: SentBytes | None,
        measured: Mapping[str, MeasuredProfile] | None = None,
    ) -> None:
        # Seconds in place of FLOPs, for tiers whose machines were measured.
        self._seconds = {
            tier: CostTable(times.seconds(profile)) for tier, times in (measured or {}).items()
        }
        self._flat = [turn for branch in plan.branches for turn in branch.turns]
        kept = [branch.way is AdapterWay.EDGE for branch in plan.branches]
        self._at_edge = np.repeat(kept, [len(branch.turns) for branch in plan.branches]).tolist()
        self._profile, self._fleet, self._states = profile, fleet, states
        self._batch, self._ratio, self._sent = batch_size, codec_ratio, sent
        self._known: dict[str, float] = {}
        self.turns = read_turns(plan, fleet, states[0])
        self._costs, turns = dict[int, CostTable](), self.turns
        if fleet.n_edges:
            # A device keeps its station for the whole round.
            station = fleet.home.copy()
            station[turns.device] = turns.edge
            states = [state.over(station) for state in states]
        # Bits per second of each turn in each state, [states, T].
        self._up_bps = np.array(
            [uplink_bps(s, turns.uplink_hz, turns.device, turns.uplink_w) for s in states]
        )
        self._down_bps = np.array(
            [downlink_bps(s, turns.downlink_hz, turns.device) for s in states]
        )
        for name, rates in (("uplink", self._up_bps), ("downlink", self._down_bps)):
            silent = np.flatnonzero((rates <= 0).any(axis=0))
            if len(silent):
                raise FedsplitError(
                    f"device={turns.device[silent[0]]}: {name} rate=0.0 bit/s: must be above 0; "
                    "the device is out of coverage, leave it out of the plan"
                )

    def groups(self) -> tuple[Group, ...]:
        """Return the turns of the round by the stages that they have."""
        alike: dict[tuple[tuple[str, ...], bool, int], list[int]] = {}
        n_blocks = self._profile.n_blocks
        for index, turn in enumerate(self._flat):
            route = turn.route
            if route.n_blocks != n_blocks:
                raise FedsplitError(f"route={route}: must be of {n_blocks} blocks, as the profile")
            tiers = tuple(segment.tier for segment in route.segments)
            alike.setdefault((tiers, self._at_edge[index], turn.residual), []).append(index)
        return tuple(self._group(*which, members) for which, members in alike.items())

    def _group(
        self, tiers: tuple[str, ...], at_edge: bool, residual: int, indices: list[int]
    ) -> Group:
        has_edges = self._fleet.n_edges > 0
        require(EDGE not in tiers or has_edges, "fleet.edges", 0, "at least 1 for such a route")
        routes = [self._flat[i].route for i in indices]
        starts = np.array([[s.start for s in route.segments] for route in routes])
        stops = np.array([[s.stop for s in route.segments] for route in routes])
        members, costs = np.array(indices), self._costs_beside(residual)
        share = np.array([self._profile.share(self._flat[i].rank) for i in indices])
        adapters = costs.segments("adapter_bytes", starts, stops) * share[:, None]
        frozen = np.array([self._flat[i].frozen for i in indices])
        fresh = np.where(frozen, [self._flat[i].fresh for i in indices], 1.0)
        stages = step_stages(tiers, has_edges)
        trained = adapters * (~frozen[:, None] | (np.arange(len(tiers)) > 0))
        forward, backward = self._boundary_bytes(members, indices, tiers, stops, trained, fresh)
        flops = {tier: _work(self._seconds.get(tier, costs), starts, stops) for tier in set(tiers)}
        sent = np.zeros((len(members), len(stages)))
        work = np.zeros((len(members), len(stages)))
        for j, stage in enumerate(stages):
            if stage.kind == COMPUTE:
                work[:, j] = self._batch * flops[stage.tier][stage.label][:, stage.segment]
                if stage.tier == DEVICE and stage.segment == 0:
                    work[:, j] *= ~frozen if stage.label == "backward" else fresh
            else:
                sent[:, j] = (forward if stage.label == "forward" else backward)[:, stage.segment]
        on_device, on_edge = (np.array([tier == one for tier in tiers]) for one in (DEVICE, EDGE))
        device_bytes = costs.together("adapter_bytes", starts, stops, on_device) * share
        edge_bytes, back = adapters[:, on_edge].sum(axis=1), device_bytes * ~frozen
        wires = int(has_edges and not at_edge)
        beside = costs.segments("residual_bytes", starts, stops)
        given = device_bytes + beside[:, on_device].sum(axis=1)
        onward = given + edge_bytes + beside[:, on_edge].sum(axis=1)
        inward = (*wires * ((BACKHAUL, onward),), (DOWNLINK, given))
        outward = ((UPLINK, back), *wires * ((BACKHAUL, back + edge_bytes),))
        return Group(
            members=members,
            tiers=tiers,
            at_edge=at_edge,
            starts=starts,
            stops=stops,
            adapter_bytes=adapters,
            costs=costs,
            share=share,
            frozen=frozen,
            before=self._adapters(members, inward, slice(0, 1)),
            step=self._block(members, stages, work, sent, slice(None)),
            after=self._adapters(members, outward, slice(-1, None)),
            pace=Pace() if tiers[-1] == DEVICE else self._profile.pace,
        )

    def _costs_beside(self, residual: int) -> CostTable:
        if residual not in self._costs:
            self._costs[residual] = CostTable(self._profile.beside(residual))
        return self._costs[residual]

    def _adapters(
        self, members: IntArray, links: Sequence[tuple[str, Array]], which: slice
    ) -> Block:
        stages = tuple(Stage(kind, "adapters", 0) for kind, _ in links)
        sent = np.stack([amount for _, amount in links], axis=1)
        return self._block(members, stages, np.zeros_like(sent), sent, which)

    def _block(
        self,
        members: IntArray,
        stages: tuple[Stage, ...],
        flops: Array,
        sent: Array,
        which: slice,
    ) -> Block:
        """Return seconds and joules of `stages` in the channel states `which`."""
        fleet, turns = self._fleet, self.turns
        device, edge = turns.device[members], turns.edge[members]
        up_bps, down_bps = self._up_bps[which][:, members].T, self._down_bps[which][:, members].T
        shape = (len(members), up_bps.shape[1], len(stages))
        work, joules = np.zeros(shape), np.zeros(shape)
        node = np.full((len(members), len(stages)), -1)
        state = self._states[0]
        for j, stage in enumerate(stages):
            bits = 8 * sent[:, [j]]
            if stage.kind == UPLINK:
                work[:, :, j] = bits / up_bps
                power = turns.uplink_w[members][:, None]
                joules[:, :, j] = transmit_energy_j(power, work[:, :, j])
            elif stage.kind == DOWNLINK:
                work[:, :, j] = bits / down_bps
                power = state.power_down_w * turns.downlink_hz[members] / state.downlink_hz
                joules[:, :, j] = transmit_energy_j(power[:, None], work[:, :, j])
            elif stage.kind == BACKHAUL:
                work[:, :, j] = bits / fleet.backhaul_bps
            else:
                if stage.tier == DEVICE:
                    machines, which_one = fleet.devices, device
                    clock = turns.device_hz[members]
                else:
                    machines = fleet.servers
                    which_one = 1 + edge if stage.tier == EDGE else np.zeros_like(edge)
                    node[:, j] = which_one
                    top = machines.clock_hz[which_one]
                    clock = top if stage.tier == EDGE else turns.server_hz[members]
                per_cycle = machines.flops_per_cycle[which_one]
                xi = machines.energy_coefficient[which_one]
                done = flops[:, j]
                if stage.tier in self._seconds:  # at the highest clock
                    done = done * machines.clock_hz[which_one] * per_cycle
                seconds = compute_delay_s(done, clock, per_cycle)
                work[:, :, j] = seconds[:, None]
                joules[:, :, j] = compute_energy_j(done, clock, per_cycle, xi)[:, None]
        return Block(stages, node, work, sent, joules)

    def _boundary_bytes(
        self,
        members: IntArray,
        indices: list[int],
        tiers: tuple[str, ...],
        stops: IntArray,
        trained: Array,
        fresh: Array,
    ) -> tuple[Array, Array]:
        """Return the bytes of each hop and mini-batch, forward and backward, ``[M, hops]``."""
        # No gradient goes back where nothing before is trained; only what is fresh leaves home.
        raw = self._batch * self._costs_beside(0).boundary_bytes[stops[:, :-1]]
        if self._fleet.length is not None:  # padding does not travel
            raw *= self._fleet.length[self.turns.device[members]][:, None]
        trained_before = np.cumsum(trained, axis=1)[:, :-1] > 0
        forward, backward = raw.copy(), np.where(trained_before, raw, 0.0)
        forward[:, :1] *= fresh[:, None]
        # On its last hop a route that returns home leads down.
        leads_up = np.array([receiver != DEVICE for receiver in tiers[1:]], dtype=bool)
        steps = np.maximum(self.turns.steps[members], 1)
        for row, index in enumerate(indices):
            codec = self._flat[index].codec
            up, down = self._expected(codec.uplink), self._expected(codec.downlink)
            forward[row] *= np.where(leads_up, up, down)
            backward[row] *= np.where(leads_up, down, up)
        self._add_messages(forward, backward, tiers, steps, trained_before, fresh)
        if self._sent is not None:
            branch, place = self.turns.branch[members], self.turns.place[members]
            for row, hop in np.ndindex(raw.shape):
                found = self._sent.get((int(branch[row]), int(place[row]), hop))
                if found is not None:
                    forward[row, hop] = found[0] / steps[row]
                    backward[row, hop] = found[1] / steps[row]
        return forward, backward

    def _expected(self, settings: Mapping[str, object]) -> float:
        """Return the expected ratio of a codec."""
        if self._ratio is None:
            return 1.0
        if (name := repr(settings)) not in self._known:
            self._known[name] = self._ratio(settings)
        return self._known[name]

    def _add_messages(
        self,
        forward: Array,
        backward: Array,
        tiers: tuple[str, ...],
        steps: IntArray,
        trained_before: BoolArray,
        fresh: Array,
    ) -> None:
        """Add headers, masks and labels, and a step's part of entering and leaving the turn."""
        messages, batch, n_hops = self._profile.messages, self._batch, len(tiers) - 1
        at_home = n_hops > 0 and tiers[-1] == DEVICE
        outward = messages.step, messages.step_reply, messages.bare_step_reply
        if at_home:
            outward = messages.forward, messages.backward_reply, messages.bare_backward_reply
        back_home = messages.forward_reply, messages.backward, messages.backward
        for hop in range(n_hops):
            homeward = at_home and hop == n_hops - 1
            there, back, bare = back_home if homeward else outward
            rows = batch * (fresh if hop == 0 else 1.0)
            forward[:, hop] += there.fixed_bytes + rows * there.sample_bytes
            replies = np.where(trained_before[:, hop], back.bytes(batch), bare.bytes(batch))
            backward[:, hop] += replies
            if not homeward:
                forward[:, hop] += messages.turn_up / steps
                backward[:, hop] += messages.turn_down / steps


def _work(costs: CostTable, starts: IntArray, stops: IntArray) -> dict[str, Array]:
    """Return what each segment computes of a sample, by the label of the stage."""
    forward, backward = (
        costs.segments(name, starts, stops) for name in ("forward_flops", "backward_flops")
    )
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}
