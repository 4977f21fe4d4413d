"""A plan's turns and a profile's figures as arrays."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsplit.arrays import Array
from fedsplit.errors import FedsplitError, require
from fedsplit.fleet.fleet import Fleet
from fedsplit.plan import RoundPlan, Turn
from fedsplit.profiles import ModelProfile, SharedWeights
from fedsplit.wireless import ChannelState

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class Turns:
    """The turns of a plan as arrays of shape ``[T]``, branch by branch and wave by wave.

    `wave` counts the waves of all branches. `slot` numbers what may run at the same time: turns of
    one branch and slot follow each other. `member` is the place in the wave.
    """

    branch: IntArray
    place: IntArray
    wave: IntArray
    slot: IntArray
    member: IntArray
    device: IntArray
    steps: IntArray
    edge: IntArray
    uplink_hz: Array
    downlink_hz: Array
    server_hz: Array
    device_hz: Array
    uplink_w: Array


class CostTable:
    """Sums of a profile's figures over ranges of blocks, for many turns at once."""

    def __init__(self, profile: ModelProfile) -> None:
        self._profile = profile
        self._sums: dict[str, Array] = {}
        blocks = (profile.embed, *profile.blocks)
        self.boundary_bytes = np.array([unit.boundary_bytes for unit in blocks])

    def segments(self, name: str, starts: IntArray, stops: IntArray) -> Array:
        """Return the sum of field `name` over each segment, ``[M, segments]``.

        The embeddings count to the first segment, the head to the last; weights that several units
        of a segment share count once.
        """
        total = self._plain(name, starts, stops)
        for group, users in self._users(starts, stops):
            total -= getattr(group, name, 0.0) * np.maximum(users - 1, 0)
        return total

    def together(self, name: str, starts: IntArray, stops: IntArray, which: BoolArray) -> Array:
        """Return the sum of field `name` over the segments `which`, on one tier; ``[M]``."""
        total: Array = self._plain(name, starts, stops)[:, which].sum(axis=1)
        for group, users in self._users(starts, stops):
            total -= getattr(group, name, 0.0) * np.maximum(users[:, which].sum(axis=1) - 1, 0)
        return total

    def _users(self, starts: IntArray, stops: IntArray) -> Iterator[tuple[SharedWeights, IntArray]]:
        """Yield each group of shared weights, and how many users each segment has of it."""
        last = self._profile.n_blocks + 1
        for group in self._profile.shared:
            users = np.zeros(starts.shape, dtype=np.int64)
            for unit in group.units:
                if unit in (0, last):
                    users[:, 0 if unit == 0 else -1] += 1
                else:
                    users += (starts < unit) & (unit <= stops)
            yield group, users

    def _plain(self, name: str, starts: IntArray, stops: IntArray) -> Array:
        if name not in self._sums:
            values = [0.0, *(getattr(unit, name) for unit in self._profile.blocks)]
            self._sums[name] = np.cumsum(values, dtype=np.float64)
        total = self._sums[name][stops] - self._sums[name][starts]
        total[:, 0] += getattr(self._profile.embed, name)
        total[:, -1] += getattr(self._profile.head, name)
        return total

    def largest(self, name: str, starts: IntArray, stops: IntArray) -> Array:
        """Return the largest of field `name` in each segment, ``[M, segments]``; 0 if empty."""
        values = np.array([getattr(unit, name) for unit in self._profile.blocks])
        ranges = np.zeros((len(values) + 1, len(values) + 1))
        for start in range(len(values)):
            ranges[start, start + 1 :] = np.maximum.accumulate(values[start:])
        found: Array = ranges[starts, stops]
        found[:, 0] = np.maximum(found[:, 0], getattr(self._profile.embed, name))
        found[:, -1] = np.maximum(found[:, -1], getattr(self._profile.head, name))
        return found


def read_turns(plan: RoundPlan, fleet: Fleet, state: ChannelState) -> Turns:
    """Return the turns of `plan` as arrays, with what it leaves open filled in.

    A bandwidth share that is None is the band over the number of devices that may be on the air at
    a time: one of each branch, or as many as train side by side in it. An edge that is None is the
    device's home.

    Raises
    ------
    FedsplitError
        If the plan names a device, edge or clock that the fleet does not have, or gives
        away more than the band.
    """
    flat = [
        (b, place, turn)
        for b, branch in enumerate(plan.branches)
        for place, turn in enumerate(branch.turns)
    ]
    widths = np.array([min(branch.width, len(branch.turns)) for branch in plan.branches])
    n_slots = int(widths.sum())

    def column(read: Callable[[Turn], float | None], default: ArrayLike) -> Array:
        others = np.broadcast_to(default, len(flat)).tolist()
        values = (read(turn) for _, _, turn in flat)
        return np.array([d if v is None else v for v, d in zip(values, others, strict=True)])

    branch = np.array([b for b, _, _ in flat])
    place = np.array([p for _, p, _ in flat])
    member = place % widths[branch]
    slot = (np.cumsum(widths) - widths)[branch] + member
    wave = np.cumsum(member == 0) - 1
    device = column(lambda turn: turn.device, 0).astype(np.int64)
    _require_index("turn.device", device, fleet.n_devices)
    edge = column(lambda turn: turn.edge, -1).astype(np.int64)
    edge = np.where(edge < 0, fleet.home[device], edge)
    _require_index("turn.edge", edge, max(fleet.n_edges, 1))
    steps = column(lambda turn: turn.steps, 0).astype(np.int64)
    require(int(steps.min()) >= 0, "turn.steps", int(steps.min()), "at least 0")
    limited = {}
    for name, highest, what in (
        ("server_hz", fleet.servers.clock_hz[:1], "the server's highest clock"),
        ("device_hz", fleet.devices.clock_hz[device], "the device's highest clock"),
        ("uplink_w", state.power_up_w[device], "the device's power"),
    ):
        limited[name] = given = column(attrgetter(name), highest)
        bad = np.flatnonzero(~((given > 0) & (given <= highest * (1 + 1e-9))))
        if len(bad):
            top = np.broadcast_to(highest, len(flat))[bad[0]]
            allowed = f"above 0 and at most {top:g}, {what}"
            require(False, f"turn.{name}", float(given[bad[0]]), allowed)
    shares = []
    for name, band, read in (
        ("uplink_hz", state.uplink_hz, lambda turn: turn.uplink_hz),
        ("downlink_hz", state.downlink_hz, lambda turn: turn.downlink_hz),
    ):
        share = column(read, band / n_slots)
        low = float(share.min())
        require(low > 0, f"turn.{name}", low, "above 0")
        in_wave = np.bincount(wave, share)
        widest = np.zeros(len(plan.branches))
        np.maximum.at(widest, branch[member == 0], in_wave)
        used = float(widest.sum())
        require(used <= band * (1 + 1e-6), f"sum of turn.{name}", used, f"at most {band:g}")
        shares.append(share)
    return Turns(
        branch=branch,
        place=place,
        wave=wave,
        slot=slot,
        member=member,
        device=device,
        steps=steps,
        edge=edge,
        uplink_hz=shares[0],
        downlink_hz=shares[1],
        **limited,
    )


def _require_index(name: str, values: IntArray, count: int) -> None:
    bad = values[(values < 0) | (values >= count)]
    if len(bad):
        raise FedsplitError(f"{name}={bad[0]}: must be from 0 to {count - 1}")
