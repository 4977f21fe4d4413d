"""What happens once for all turns of a wave: averaging, and an edge's exchange with the cloud."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.fleet.cost import compute_delay_s, compute_energy_j
from fedsplit.fleet.fleet import Fleet
from fedsplit.fleet.stages import Group
from fedsplit.fleet.steps import BACKHAUL
from fedsplit.fleet.turns import Turns
from fedsplit.plan import DEVICE, EDGE, AdapterWay, RoundPlan

IntArray = NDArray[np.int64]

AGGREGATE = "aggregate"
# A weighted mean multiplies and adds once per 4-byte adapter value and set.
AGGREGATION_FLOPS_PER_BYTE = 0.5


@dataclass(frozen=True, kw_only=True)
class Chore:
    """Something done once for a wave.

    Parameters
    ----------
    wave : int
        The wave.
    before : bool
        Whether it comes before the wave's turns, or after the last of them.
    kind : str
        "backhaul" or "aggregate".
    node : int
        Server that averages; for the backhaul, the edge's number plus one.
    offset_s, seconds : float
        Start, from when the branch comes to the wave (before) or its last turn ends (after), and
        how long it takes.
    sent_bytes, joules : float
        What it costs.
    """

    wave: int
    before: bool
    kind: str
    node: int
    offset_s: float
    seconds: float
    sent_bytes: float = 0.0
    joules: float = 0.0


@dataclass(frozen=True, eq=False)
class Waves:
    """The waves of a round, branch by branch.

    Parameters
    ----------
    branch : ndarray of int
        Branch of each, shape ``[W]``.
    first : ndarray of int
        Index of each one's first turn, shape ``[W]``.
    before_s, after_s : ndarray
        Time of the chores around its turns, shape ``[W]``.
    chores : tuple of Chore
        What is done then.
    """

    branch: IntArray
    first: IntArray
    before_s: Array
    after_s: Array
    chores: tuple[Chore, ...]


def averaging(adapter_bytes: float, n_sets: int, fleet: Fleet, node: int) -> tuple[float, float]:
    """Return seconds and joules of averaging `n_sets` of adapters on server `node`."""
    flops = AGGREGATION_FLOPS_PER_BYTE * adapter_bytes * n_sets if n_sets > 1 else 0.0
    machine = fleet.servers
    clock, per_cycle = machine.clock_hz[node], machine.flops_per_cycle[node]
    joules = compute_energy_j(flops, clock, per_cycle, machine.energy_coefficient[node])
    return float(compute_delay_s(flops, clock, per_cycle)), float(joules)


def read_waves(plan: RoundPlan, turns: Turns, groups: Sequence[Group], fleet: Fleet) -> Waves:
    """Return the waves of `plan`, and what is done around them.

    Where an edge averages (`AdapterWay.EDGE`), the adapters of its devices and its own cross the
    backhaul once before the first wave and once after the last; the server averages the rest
    meanwhile. Anywhere else the server averages them all.
    """
    first = np.flatnonzero(turns.member == 0)
    sizes = np.diff(np.append(first, len(turns.branch)))
    branch = turns.branch[first]
    opens = np.diff(branch, prepend=-1) > 0
    closes = np.append(opens[1:], True)
    near, far, beside = _adapter_bytes(turns, groups)
    chores: list[Chore] = []
    of_interest = [b for b, one in enumerate(plan.branches) if one.way is not AdapterWay.MESSAGE]
    for wave in np.flatnonzero(np.isin(branch, of_interest)).tolist():
        turn, n_sets = first[wave], int(sizes[wave])
        at_edge = plan.branches[branch[wave]].way is AdapterWay.EDGE
        node = 1 + int(turns.edge[turn]) if at_edge else 0
        if at_edge and opens[wave]:
            sent = float(near[turn] + beside[turn])
            chores.append(
                Chore(
                    wave=wave,
                    before=True,
                    kind=BACKHAUL,
                    node=node,
                    offset_s=0.0,
                    seconds=8 * sent / fleet.backhaul_bps,
                    sent_bytes=sent,
                )
            )
        shares = ((node, near[turn]), (0, far[turn])) if at_edge else ((0, near[turn] + far[turn]),)
        averaged_s = 0.0
        for server, amount in shares if n_sets > 1 else ():
            seconds, joules = averaging(float(amount), n_sets, fleet, server)
            chores.append(
                Chore(
                    wave=wave,
                    before=False,
                    kind=AGGREGATE,
                    node=server,
                    offset_s=0.0,
                    seconds=seconds,
                    joules=joules,
                )
            )
            averaged_s = seconds if server == node else averaged_s
        if at_edge and closes[wave]:
            sent = float(near[turn])
            chores.append(
                Chore(
                    wave=wave,
                    before=False,
                    kind=BACKHAUL,
                    node=node,
                    offset_s=averaged_s,
                    seconds=8 * sent / fleet.backhaul_bps,
                    sent_bytes=sent,
                )
            )
    before_s, after_s = np.zeros(len(first)), np.zeros(len(first))
    for chore in chores:
        longest = before_s if chore.before else after_s
        longest[chore.wave] = max(longest[chore.wave], chore.offset_s + chore.seconds)
    return Waves(branch, first, before_s, after_s, tuple(chores))


def _adapter_bytes(turns: Turns, groups: Sequence[Group]) -> tuple[Array, Array, Array]:
    """Return the adapters that each turn has on device and edge, and behind them; ``[T]``.

    And, third, what is beside the first.
    """
    kept, rest, beside = np.zeros((3, len(turns.branch)))
    for group in groups:
        near = np.array([tier in (DEVICE, EDGE) for tier in group.tiers])
        for amount, which in ((kept, near), (rest, ~near)):
            whole = group.costs.together("adapter_bytes", group.starts, group.stops, which)
            amount[group.members] = whole * group.share
        given = group.costs.segments("residual_bytes", group.starts, group.stops)
        beside[group.members] = given[:, near].sum(axis=1)
    return kept, rest, beside
