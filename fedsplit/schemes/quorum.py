"""Rounds that end before their slowest devices do."""

from dataclasses import replace
from itertools import accumulate

from fedsplit.plan import Branch, RoundPlan
from fedsplit.schemes.scene import Scene


def in_time(plan: RoundPlan, scene: Scene, quorum: int) -> RoundPlan:
    """Return the branches of `plan` that end first, until they have `quorum` devices.

    When a branch ends is said by the timeline of the whole plan, so that the same devices are late
    whenever the round is repeated. The others are left out: what they trained would be dropped.
    Bandwidths stay what they were among all.

    Parameters
    ----------
    plan : RoundPlan
        A plan as `planned` returns it.
    scene : Scene
        What it was planned for.
    quorum : int
        Devices that end the round; branches are taken whole.
    """
    if quorum >= len(plan.devices):
        return plan
    line = scene.timeline(plan)
    up_hz, down_hz = line.bands_hz
    stops = list(accumulate(len(branch.turns) for branch in plan.branches))
    ended = []
    for index, (branch, stop) in enumerate(zip(plan.branches, stops, strict=True)):
        own = range(stop - len(branch.turns), stop)
        turns = tuple(
            replace(turn, uplink_hz=float(up_hz[place]), downlink_hz=float(down_hz[place]))
            for turn, place in zip(branch.turns, own, strict=True)
        )
        end_s = max(float(line.turn_end_s[place]) for place in own)
        ended.append((end_s, index, Branch(turns, branch.width)))
    ended.sort(key=lambda item: item[:2])
    counts = list(accumulate(len(branch.devices) for _, _, branch in ended))
    enough = next(place for place, count in enumerate(counts, start=1) if count >= quorum)
    kept = sorted(ended[:enough], key=lambda item: item[1])
    return RoundPlan(tuple(branch for _, _, branch in kept))
