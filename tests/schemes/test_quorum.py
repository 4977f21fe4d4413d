"""Rounds that end with their first devices, by the modelled system."""

from dataclasses import replace

import pytest
from fedsplit.strategies.gsfl import Gsfl
from fedsplit.strategies.splitfed import SplitFed
from fedsplit.strategies.vanilla import Vanilla

from fedsplit.plan import RoundPlan
from fedsplit.schemes import Scene, planned
from fedsplit.schemes.quorum import in_time
from fedsplit.testing.scenes import make_scene


def scene_of(devices: int = 6) -> Scene:
    """A scene whose server takes no time, so that no device waits for another."""
    scene = make_scene(devices)
    servers = replace(scene.fleet.servers, clock_hz=1e6 * scene.fleet.servers.clock_hz)
    return replace(scene, fleet=replace(scene.fleet, servers=servers))


def ends_s(plan: RoundPlan, scene: Scene) -> dict[int, float]:
    return dict(zip(plan.devices, scene.timeline(plan).turn_end_s.tolist(), strict=True))


@pytest.mark.parametrize("quorum", [1, 3, 5])
def test_those_who_end_first_are_in_time_and_as_fast_as_among_all(quorum: int) -> None:
    scene = scene_of()
    whole = planned(SplitFed(cut=2), scene)
    among_all = ends_s(whole, scene)
    kept = in_time(whole, scene, quorum)
    first = sorted(among_all, key=lambda device: among_all[device])[:quorum]
    assert sorted(kept.devices) == sorted(first)
    assert list(kept.devices) == [device for device in whole.devices if device in first]
    for device, end_s in ends_s(kept, scene).items():
        assert end_s == pytest.approx(among_all[device], rel=1e-3)
    assert in_time(whole, scene, quorum) == kept


def test_branches_are_taken_whole() -> None:
    scene = scene_of()
    whole = planned(Gsfl(groups=3, cut=2), scene)
    kept = in_time(whole, scene, 3)
    assert len(kept.branches) == 2
    assert [b.devices for b in kept.branches] == [
        b.devices for b in whole.branches if b.devices[0] in kept.devices
    ]
    one = planned(Vanilla(cut=2), scene)
    assert in_time(one, scene, 1).devices == one.devices


def test_with_all_devices_the_plan_is_as_it_was() -> None:
    scene = scene_of()
    whole = planned(SplitFed(cut=2), scene)
    assert in_time(whole, scene, 6) is whole
