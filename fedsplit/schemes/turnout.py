"""Who takes part in a round, whom it waits for, and when it ends; all by the modelled system."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from fedsplit.errors import FedsplitError, require, require_choice
from fedsplit.fleet import Timeline
from fedsplit.plan import Branch, RoundPlan
from fedsplit.schemes.check import costed
from fedsplit.schemes.residuals import residual_after, with_residuals
from fedsplit.schemes.scene import Scene
from fedsplit.schemes.scheme import Scheme
from fedsplit.wireless import ChannelState

DROP, CARRY = "drop", "carry"
_STEEPEST = 10.0


class OutOfEnergy(FedsplitError):
    """No device has energy left for another turn."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Whom a round waits for.

    Parameters
    ----------
    quorum_devices : int or None
        A round ends with so many devices, those that are the first; branches are taken whole.
        None: all.
    late : str
        ``drop``: the turns of the others are not trained. ``carry``: they are, from the adapters of
        the round that they began in, and what they change is aggregated in the round in which they
        come; until then their devices have no other turn. Who comes counts for the quorum, as in
        FedBuff (Nguyen et al., AISTATS 2022).
    staleness : float
        The exponent a of `weight`, from 0 (all count the same) to 10.

    Raises
    ------
    SettingsError
        If a value is out of range, or late devices are to be carried where all are waited for.
    """

    quorum_devices: int | None = None
    late: str = DROP
    staleness: float = 0.5

    def __post_init__(self) -> None:
        enough = self.quorum_devices
        require(enough is None or enough >= 1, "quorum_devices", enough, "null or at least 1")
        require_choice("late", self.late, (DROP, CARRY))
        waits = self.late == DROP or enough is not None
        require(waits, "late", self.late, f"{DROP} without run.quorum_devices, where none is late")
        allowed = f"from 0 to {_STEEPEST:g}"
        require(0 <= self.staleness <= _STEEPEST, "staleness", self.staleness, allowed)

    def weight(self, rounds: int) -> float:
        """Return how much an update that is so many `rounds` late counts, ``(1 + rounds)^-a``.

        The polynomial rule of FedAsync (Xie et al., arXiv 1903.03934); FedBuff's is a = 1/2.
        """
        return float((1 + rounds) ** -self.staleness)


@dataclass(frozen=True, kw_only=True)
class UnderWay:
    """A branch that the round which it began in did not wait for.

    Parameters
    ----------
    devices : tuple of int
        Its devices.
    since : int
        The round that it began in.
    left_s : float
        When it comes, from the beginning of the next round.
    uplink_hz, downlink_hz : float
        What it holds of the bands until then.
    """

    devices: tuple[int, ...]
    since: int
    left_s: float
    uplink_hz: float
    downlink_hz: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Turnout:
    """A planned round, and who of it is there when it ends.

    Parameters
    ----------
    plan : RoundPlan
        What is trained.
    line : Timeline
        What that costs, as planned; who interrupts its turn is not in it.
    away_s : tuple of float
        For how long in all devices of each branch of `plan` are away.
    in_time : tuple of int
        The branches of `plan` that the round waits for.
    arriving, under_way : tuple of UnderWay
        Of earlier rounds, who comes in this one; who is still to come after it.
    weights : tuple of float
        How much each of `arriving` counts (`Waiting.weight`).
    late : tuple of int
        Devices that began in this round and that it does not wait for.
    left : tuple of int
        Devices that leave it (`fedsplit.fleet.DropoutSpec`).
    exhausted : tuple of int
        Devices that take no part from this round on, as a turn would overspend their energy.
    residual : int
        Components beside the adapters that the round leaves.
    """

    plan: RoundPlan
    line: Timeline
    away_s: tuple[float, ...]
    in_time: tuple[int, ...]
    arriving: tuple[UnderWay, ...] = ()
    under_way: tuple[UnderWay, ...] = ()
    weights: tuple[float, ...] = ()
    late: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    exhausted: tuple[int, ...] = ()
    residual: int = 0

    def delay_s(self, line: Timeline) -> float:
        """Return when the round ends, with the times of a `line` of its plan."""
        ends = [float(line.branch_end_s[place]) + self.away_s[place] for place in self.in_time]
        return max(*ends, *(max(one.left_s, 0.0) for one in self.arriving), 0.0) + (
            line.aggregation_s
        )


def turn_out(
    scheme: Scheme,
    scene: Scene,
    waiting: Waiting | None = None,
    under_way: Sequence[UnderWay] = (),
) -> Turnout:
    """Have `scheme` plan a round, and say who of it comes and when it ends.

    Everything follows from the scene and the timeline of the whole plan, so the same devices are
    late whenever the round is repeated. Bands are those among all, also for those who are waited
    for; who is under way keeps its own, and only the rest is planned with.

    Parameters
    ----------
    scheme : Scheme
        Plans the round, for the devices of `scene` that have energy left.
    scene : Scene
        The situation; who is under way is not among its devices.
    waiting : Waiting, optional
        Whom the round waits for; for all by default.
    under_way : sequence of UnderWay
        Who is still to come from the rounds before.

    Raises
    ------
    PlanError
        As `planned`.
    SettingsError
        If devices do not come back, and the waves of a branch are of different ones.
    OutOfEnergy
        If no device of `scene` has energy left.
    """
    waiting = waiting or Waiting()
    scene = _beside(scene, under_way)
    plan, line, exhausted = _affordable(scheme, scene)
    dropout = scene.fleet.dropout
    left = dropout.leaving(plan.devices, scene.seed, scene.server_round)
    if dropout.probability > 0 and dropout.away_s is None:
        _require_leavable(plan)
        plan = with_residuals(_without(_pinned(plan, line), left), scene)
        line = scene.timeline(plan)
    away_s = [_away_s(branch, left, dropout.away_s or 0.0) for branch in plan.branches]
    ends_s = [float(end) + gone for end, gone in zip(line.branch_end_s, away_s, strict=True)]
    carries = waiting.late == CARRY
    events = [
        (max(one.left_s, 0.0), 0, place, carries * len(one.devices))
        for place, one in enumerate(under_way)
    ]
    events += [
        (end_s, 1, place, len(branch.devices))
        for place, (end_s, branch) in enumerate(zip(ends_s, plan.branches, strict=True))
    ]
    events.sort()
    counts = list(accumulate(count for *_, count in events))
    quorum = min(waiting.quorum_devices or counts[-1], counts[-1])
    there = events[: 1 + next(at for at, count in enumerate(counts) if count >= quorum)]
    in_time = sorted(place for _, fresh, place, _ in there if fresh)
    come = {place for _, fresh, place, _ in there if not fresh}
    behind = sorted(set(range(len(ends_s))).difference(in_time))
    late = tuple(device for place in behind for device in plan.branches[place].devices)
    if late or under_way:
        plan = _pinned(plan, line)
    if late and not carries:
        plan = RoundPlan(tuple(plan.branches[place] for place in in_time))
        away_s, line = [away_s[place] for place in in_time], scene.timeline(plan)
        in_time, behind = list(range(len(in_time))), []
    arriving = tuple(one for place, one in enumerate(under_way) if place in come)
    found = Turnout(
        plan=plan,
        line=line,
        away_s=tuple(away_s),
        in_time=tuple(in_time),
        arriving=arriving,
        weights=tuple(waiting.weight(scene.server_round - one.since) for one in arriving),
        late=late,
        left=left,
        exhausted=exhausted,
        residual=residual_after([plan.branches[place] for place in in_time], scene),
    )
    end_s = found.delay_s(line)
    older = [
        replace(one, left_s=one.left_s - end_s)
        for place, one in enumerate(under_way)
        if place not in come
    ]
    newer = [
        _started(plan.branches[place], scene.server_round, ends_s[place] - end_s)
        for place in behind
    ]
    return replace(found, under_way=(*older, *newer))


def _started(branch: Branch, server_round: int, left_s: float) -> UnderWay:
    """Return a branch of this round that is still to come."""
    up = max(sum(turn.uplink_hz or 0.0 for turn in wave) for wave in branch.waves)
    down = max(sum(turn.downlink_hz or 0.0 for turn in wave) for wave in branch.waves)
    return UnderWay(
        devices=branch.devices, since=server_round, left_s=left_s, uplink_hz=up, downlink_hz=down
    )


def _beside(scene: Scene, under_way: Sequence[UnderWay]) -> Scene:
    """Return the situation of those who have what others do not hold of the bands."""
    if not under_way:
        return scene
    up, down = (math.fsum(getattr(one, way) for one in under_way) for way in _BANDS)

    def rest(state: ChannelState) -> ChannelState:
        free = state.downlink_hz - down
        # The station spreads its power evenly over the whole band.
        power_w = state.power_down_w * free / state.downlink_hz
        return replace(
            state, uplink_hz=state.uplink_hz - up, downlink_hz=free, power_down_w=power_w
        )

    steps, mean = scene.channel_by_step, scene.mean_channel
    return replace(
        scene,
        channel=rest(scene.channel),
        mean_channel=lambda server_round: rest(mean(server_round)),
        channel_by_step=None if steps is None else lambda n: [rest(state) for state in steps(n)],
    )


_BANDS = ("uplink_hz", "downlink_hz")


def _affordable(scheme: Scheme, scene: Scene) -> tuple[RoundPlan, Timeline, tuple[int, ...]]:
    """Return the plan of those whose energy suffices for it, its cost, and who is not of them."""
    out: tuple[int, ...] = ()
    while True:
        plan, line = costed(scheme, scene)
        budget_j = scene.fleet.budget_j
        if budget_j is None:
            return plan, line, ()
        spent_j = line.cost.device_energy_j + (0.0 if scene.spent_j is None else scene.spent_j)
        over = tuple(device for device in scene.devices if spent_j[device] > budget_j[device])
        if not over:
            return plan, line, out
        out += over
        rest = {device: n for device, n in scene.samples.items() if device not in over}
        if not rest:
            raise OutOfEnergy(
                f"round {scene.server_round}: no device that could take part has energy left for "
                "a turn (fleet.budget_j)"
            )
        # Whoever is left has more of the band, and may send at less.
        scene = replace(scene, samples=rest)


def _pinned(plan: RoundPlan, line: Timeline) -> RoundPlan:
    """Return `plan` with the bands that its turns have among all of it."""
    bands = zip(*line.bands_hz, strict=True)
    return RoundPlan(
        tuple(
            Branch(
                tuple(
                    replace(turn, uplink_hz=float(up), downlink_hz=float(down))
                    for turn, (up, down) in zip(branch.turns, bands, strict=False)
                ),
                branch.width,
            )
            for branch in plan.branches
        )
    )


def _require_leavable(plan: RoundPlan) -> None:
    """Refuse waves of several devices that would be of unequal width without some."""
    for branch in plan.branches:
        waves = {frozenset(turn.device for turn in wave) for wave in branch.waves}
        allowed = "a number with a scheme whose waves are of different devices"
        same = branch.width == 1 or len(waves) == 1
        require(same, "fleet.dropout.away_s", None, allowed)


def _without(plan: RoundPlan, left: Sequence[int]) -> RoundPlan:
    """Return `plan` without the turns of devices that do not come back."""
    branches = []
    for branch in plan.branches:
        turns = tuple(turn for turn in branch.turns if turn.device not in left)
        width = len({turn.device for turn in turns}) if branch.width > 1 else 1
        if turns:
            branches.append(Branch(turns, width))
    return RoundPlan(tuple(branches))


def _away_s(branch: Branch, left: Sequence[int], away_s: float) -> float:
    """Return for how long a branch waits for its devices that are away."""
    absent = (any(t.device in left and t.repeat == 0 for t in wave) for wave in branch.waves)
    return away_s * sum(absent)
