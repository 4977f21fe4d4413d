"""Who a round waits for, and when it ends, by the modelled system."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from fedsplit.strategies.gsfl import Gsfl
from fedsplit.strategies.splitfed import SplitFed
from fedsplit.strategies.splitllm import SplitLlm
from fedsplit.strategies.vanilla import Vanilla

from fedsplit.errors import SettingsError
from fedsplit.fleet import DropoutSpec
from fedsplit.plan import Branch, RoundPlan, Route
from fedsplit.schemes import Scene, Scheme, planned
from fedsplit.schemes.turnout import CARRY, DROP, OutOfEnergy, Turnout, UnderWay, Waiting, turn_out
from fedsplit.testing.scenes import make_scene

ALL = 6


def scene_of(present: Sequence[int] | None = None, server_round: int = 1, **fleet: object) -> Scene:
    """A scene whose server takes no time, so that no device waits for another."""
    scene = make_scene(ALL, present=present, server_round=server_round)
    servers = replace(scene.fleet.servers, clock_hz=1e6 * scene.fleet.servers.clock_hz)
    return replace(scene, fleet=replace(scene.fleet, servers=servers, **fleet))


class Pairs(Scheme):
    """One branch whose waves are of two devices each."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        route = Route.two_tier(scene.n_blocks, cut=2)
        turns = tuple(scene.turn(device, route) for device in scene.devices)
        return RoundPlan((Branch(turns, width=2),))


def ends_s(plan: RoundPlan, scene: Scene) -> dict[int, float]:
    return dict(zip(plan.devices, scene.timeline(plan).turn_end_s.tolist(), strict=True))


def by_end(scene: Scene) -> tuple[list[int], dict[int, float]]:
    found = ends_s(planned(SplitFed(cut=2), scene), scene)
    return sorted(found, key=lambda device: found[device]), found


def history(rounds: int, waiting: Waiting) -> list[Turnout]:
    """Rounds of SplitFed one after the other, by all who are free."""
    found, under_way = list[Turnout](), tuple[UnderWay, ...]()
    for server_round in range(1, rounds + 1):
        busy = {device for one in under_way for device in one.devices}
        scene = scene_of([i for i in range(ALL) if i not in busy], server_round)
        found.append(turn_out(SplitFed(cut=2), scene, waiting, under_way))
        under_way = found[-1].under_way
    return found


@pytest.mark.parametrize("quorum", [1, 3, 5])
def test_those_who_end_first_are_in_time_and_as_fast_as_among_all(quorum: int) -> None:
    scene = scene_of()
    whole = planned(SplitFed(cut=2), scene)
    among_all = ends_s(whole, scene)
    waiting = Waiting(quorum_devices=quorum)
    kept = turn_out(SplitFed(cut=2), scene, waiting).plan
    first = sorted(among_all, key=lambda device: among_all[device])[:quorum]
    assert sorted(kept.devices) == sorted(first)
    assert list(kept.devices) == [device for device in whole.devices if device in first]
    for device, end_s in ends_s(kept, scene).items():
        assert end_s == pytest.approx(among_all[device], rel=1e-3)
    assert turn_out(SplitFed(cut=2), scene, waiting).plan == kept


def test_branches_are_taken_whole() -> None:
    scene = scene_of()
    whole = planned(Gsfl(groups=3, cut=2), scene)
    kept = turn_out(Gsfl(groups=3, cut=2), scene, Waiting(quorum_devices=3)).plan
    assert len(kept.branches) == 2
    assert [b.devices for b in kept.branches] == [
        b.devices for b in whole.branches if b.devices[0] in kept.devices
    ]
    one = planned(Vanilla(cut=2), scene)
    found = turn_out(Vanilla(cut=2), scene, Waiting(quorum_devices=1))
    assert found.plan.devices == one.devices


def test_with_all_devices_the_plan_is_as_it_was() -> None:
    scene = scene_of()
    whole = planned(SplitFed(cut=2), scene)
    for waiting in (Waiting(), Waiting(quorum_devices=6), Waiting(quorum_devices=6, late=CARRY)):
        found = turn_out(SplitFed(cut=2), scene, waiting)
        assert found.plan == whole
        assert found.delay_s(found.line) == scene.timeline(whole).cost.delay_s
        assert (found.late, found.under_way, found.left, found.exhausted) == ((), (), (), ())


def test_carried_devices_train_and_come_when_the_clock_says_so() -> None:
    scene = scene_of()
    order, end_s = by_end(scene)
    found = turn_out(SplitFed(cut=2), scene, Waiting(quorum_devices=4, late=CARRY))
    assert found.plan.devices == scene.devices
    assert sorted(found.late) == sorted(order[4:])
    over_s = found.delay_s(found.line)
    assert over_s == pytest.approx(end_s[order[3]] + found.line.aggregation_s)
    for one in found.under_way:
        assert one.since == 1
        assert one.left_s == pytest.approx(end_s[one.devices[0]] - over_s)


def test_no_second_is_lost_between_rounds_and_nobody_comes_twice() -> None:
    rounds = history(8, Waiting(quorum_devices=4, late=CARRY))
    clock_s, due_s, came = 0.0, dict[tuple[int, int], float](), set[tuple[int, int]]()
    for server_round, found in enumerate(rounds, start=1):
        over_s = clock_s + found.delay_s(found.line)
        for one in found.arriving:
            key = one.devices[0], one.since
            assert due_s.pop(key) <= over_s
            assert key not in came
            came.add(key)
        assert all(due > over_s - found.line.aggregation_s for due in due_s.values())
        ends = found.line.branch_end_s
        for place, branch in enumerate(found.plan.branches):
            if place not in found.in_time:
                due_s[branch.devices[0], server_round] = clock_s + float(ends[place])
        assert {(one.devices[0], one.since) for one in found.under_way} == due_s.keys()
        for one in found.under_way:
            assert over_s + one.left_s == pytest.approx(due_s[one.devices[0], one.since])
        brought = len(found.in_time) + len(found.arriving)
        assert brought >= 4
        clock_s = over_s
    assert came
    assert history(8, Waiting(quorum_devices=4, late=CARRY))[-1].under_way == rounds[-1].under_way


def test_who_is_under_way_keeps_its_band_and_others_share_the_rest() -> None:
    rounds = history(6, Waiting(quorum_devices=3, late=CARRY))
    band_hz = scene_of().channel.uplink_hz
    for before, found in pairwise(rounds):
        held_hz = sum(one.uplink_hz for one in before.under_way)
        assert held_hz > 0
        shares_hz = sum(branch.turns[0].uplink_hz or 0.0 for branch in found.plan.branches)
        assert held_hz + shares_hz == pytest.approx(band_hz)


def test_the_power_of_a_station_does_not_grow_with_those_under_way() -> None:
    scene = scene_of([0, 1, 2])
    alone = scene.timeline(planned(SplitFed(cut=2), scene))
    half = scene.channel.downlink_hz / 2
    up = scene.channel.uplink_hz / 2
    gone = UnderWay(devices=(5,), since=1, left_s=1e9, uplink_hz=up, downlink_hz=half)
    found = turn_out(SplitFed(cut=2), scene, Waiting(), [gone]).line
    # Half the band at the same power density: half the rate.
    assert found.cost.downlink_s == pytest.approx(2 * alone.cost.downlink_s)


def test_weights_fall_with_staleness_as_fedasync_has_them() -> None:
    waiting = Waiting(quorum_devices=1, late=CARRY, staleness=0.5)
    assert [waiting.weight(rounds) for rounds in (0, 3)] == [1.0, 0.5]
    assert Waiting(staleness=0.0).weight(9) == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quorum_devices": 0}, "quorum_devices=0"),
        ({"late": "keep"}, "late='keep': must be one of drop, carry"),
        ({"late": CARRY}, "late='carry': must be drop without run.quorum_devices"),
        ({"staleness": -1.0}, "staleness=-1.0"),
        ({"staleness": float("nan")}, "staleness=nan"),
    ],
)
def test_wrong_settings_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Waiting(**given)


def test_devices_that_are_away_come_later_by_that() -> None:
    scene = scene_of(dropout=DropoutSpec(0.5, away_s=100.0))
    _, end_s = by_end(scene)
    found = turn_out(SplitFed(cut=2), scene)
    assert 0 < len(found.left) < ALL
    slowest = max(end_s[device] for device in found.left)
    assert found.delay_s(found.line) == pytest.approx(100 + slowest + found.line.aggregation_s)
    enough = Waiting(quorum_devices=ALL - len(found.left))
    assert sorted(turn_out(SplitFed(cut=2), scene, enough).late) == sorted(found.left)
    one_after_the_other = turn_out(Vanilla(cut=2), scene)
    plain = scene.timeline(one_after_the_other.plan).cost.delay_s
    assert one_after_the_other.delay_s(one_after_the_other.line) == pytest.approx(
        plain + 100 * len(one_after_the_other.left)
    )


@pytest.mark.parametrize(
    "scheme",
    [SplitFed(cut=2), Gsfl(groups=2, cut=2), Vanilla(cut=2)],
    ids=lambda s: type(s).__name__,
)
def test_devices_that_do_not_come_back_lose_their_turns(scheme: SplitFed | Gsfl | Vanilla) -> None:
    scene = scene_of(dropout=DropoutSpec(0.5))
    found = turn_out(scheme, scene)
    assert found.left
    assert sorted((*found.plan.devices, *found.left)) == list(range(ALL))
    assert not found.late


def test_waves_of_the_same_devices_go_on_without_some_and_others_are_refused() -> None:
    scene = make_scene(ALL, edges=2)
    scene = replace(scene, fleet=replace(scene.fleet, dropout=DropoutSpec(0.9)))
    found = turn_out(SplitLlm(1, 3), scene)
    assert found.left
    assert not {*found.left} & {*found.plan.devices}
    scene = scene_of(dropout=DropoutSpec(0.01))
    with pytest.raises(SettingsError, match="fleet.dropout.away_s=None: must be a number"):
        turn_out(Pairs(), scene)


def test_dropouts_are_as_frequent_as_asked_drawn_for_each_round_and_somebody_stays() -> None:
    spec, devices = DropoutSpec(0.3), range(10)
    drawn = [spec.leaving(devices, 0, number) for number in range(1, 401)]
    assert sum(map(len, drawn)) / 4000 == pytest.approx(0.3, abs=0.02)
    assert len(set(drawn)) > 100
    # Who leaves depends on a device's index alone, not on who else takes part.
    assert spec.leaving((2, 5, 9), 0, 3) == tuple(d for d in drawn[2] if d in (2, 5, 9))
    assert all(len(DropoutSpec(0.99).leaving((0, 1), 0, number)) < 2 for number in range(50))


def test_a_device_whose_energy_would_be_overspent_takes_no_part() -> None:
    scene = scene_of()
    cost_j = scene.timeline(planned(SplitFed(cut=2), scene)).cost.device_energy_j
    budget_j = np.full(ALL, np.inf)
    budget_j[2], budget_j[4] = 2.5 * cost_j[2], 1.0 * cost_j[4]
    scene = replace(scene, fleet=replace(scene.fleet, budget_j=budget_j))
    assert turn_out(SplitFed(cut=2), scene).exhausted == ()
    later = replace(scene, spent_j=2 * cost_j)
    found = turn_out(SplitFed(cut=2), later, Waiting(quorum_devices=3))
    assert found.exhausted == (2, 4)
    assert not {2, 4} & {*found.plan.devices, *found.late}
    nobody = replace(later, fleet=replace(scene.fleet, budget_j=np.zeros(ALL)))
    with pytest.raises(OutOfEnergy, match="round 1: no device"):
        turn_out(SplitFed(cut=2), nobody)


def test_what_is_under_way_comes_also_where_late_ones_are_dropped_now() -> None:
    soon = UnderWay(devices=(5,), since=1, left_s=-0.1, uplink_hz=1.0, downlink_hz=1.0)
    never = replace(soon, devices=(4,), left_s=1e9)
    scene = scene_of([0, 1, 2, 3], server_round=3)
    found = turn_out(SplitFed(cut=2), scene, Waiting(quorum_devices=2, late=DROP), [soon, never])
    assert [one.devices for one in found.arriving] == [(5,)]
    assert found.weights == (pytest.approx(3**-0.5),)
    assert [one.devices for one in found.under_way] == [(4,)]
    assert len(found.plan.devices) == 2
