"""A plan is refused when it is planned, by scheme, round, device and field."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedsplit.errors import FedsplitError, PlanError
from fedsplit.plan import Branch, CodecPlan, RoundPlan, Route, Turn
from fedsplit.schemes import Scene, Scheme, check, planned, planned_evaluation
from fedsplit.testing.scenes import N_BLOCKS, make_scene


class Changed(Scheme):
    """Two tiers, but for what a test changes in one device's turn."""

    def __init__(self, which: int, /, route: Route | None = None, **changes: Any) -> None:
        self.which, self.route, self.changes = which, route, changes

    def plan_round(self, scene: Scene) -> RoundPlan:
        route = Route.two_tier(scene.n_blocks, 2)
        turns = [scene.turn(device, route) for device in scene.devices]
        changed = self.changes | ({"route": self.route} if self.route is not None else {})
        turns[self.which] = replace(turns[self.which], **changed)
        return RoundPlan.parallel(turns)


THREE = Route.three_tier(N_BLOCKS, 1, 3)
BAND = make_scene().channel.uplink_hz
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another model's blocks": ({"route": Route.two_tier(4, 2)}, "device 1: route=.* of 6 blocks"),
    "no such edge": ({"route": THREE, "edge": 7}, "device 1: edge=7: must be from 0 to 1"),
    "a negative edge": ({"route": THREE, "edge": -1}, "device 1: edge=-1: must be from 0 to 1"),
    "an edge that is no number": ({"route": THREE, "edge": "a"}, "device 1: edge='a': must be"),
    "no steps": ({"steps": 0}, "device 1: steps=0: must be a whole number of at least 1"),
    "half a step": ({"steps": 1.5}, "device 1: steps=1.5: must be a whole number"),
    "steps that are true": ({"steps": True}, "device 1: steps=True: must be a whole number"),
    "a negative repeat": ({"repeat": -1}, "device 1: repeat=-1: must be a whole number"),
    "no band": ({"uplink_hz": 0.0}, "uplink_hz=0.0: must be above 0"),
    "a negative band": ({"downlink_hz": -1.0}, "downlink_hz=-1.0: must be above 0"),
    "more than the band": ({"uplink_hz": 2 * BAND}, "sum of turn.uplink_hz=.*: must be at most"),
    "a stopped server": ({"server_hz": 0.0}, "server_hz=0.0: must be above 0"),
    "a server beyond its clock": ({"server_hz": 1e15}, "server_hz=.*: must be above 0 and at most"),
    "a device that is not there": ({"device": 99}, "device 99: device=99: must be one that takes"),
}


@pytest.mark.parametrize(("changes", "complaint"), WRONG.values(), ids=WRONG)
def test_a_wrong_turn_is_named(changes: dict[str, Any], complaint: str) -> None:
    scene = make_scene(edges=2, server_round=2)
    with pytest.raises(PlanError, match=f"(?s)^Changed, round 2.*{complaint}"):
        planned(Changed(1, **changes), scene)


def test_every_device_with_the_whole_band_is_refused() -> None:
    scene = make_scene()
    route = Route.two_tier(N_BLOCKS, 2)
    greedy = RoundPlan.parallel(
        replace(scene.turn(device, route), uplink_hz=scene.channel.uplink_hz)
        for device in scene.devices
    )
    with pytest.raises(PlanError, match="sum of turn.uplink_hz"):
        check(greedy, scene)


def test_an_edge_that_was_forgotten_is_the_devices_home() -> None:
    scene = make_scene(edges=2)
    plan = RoundPlan.parallel(scene.turn(device, THREE) for device in scene.devices)
    filled = check(plan, scene)
    edges = {turn.device: turn.edge for branch in filled.branches for turn in branch.turns}
    assert edges == {device: int(scene.fleet.home[device]) for device in scene.devices}
    assert check(filled, scene) == filled


def test_an_edge_needs_a_fleet_that_has_one() -> None:
    scene = make_scene(edges=0)
    plan = RoundPlan.parallel(scene.turn(device, THREE) for device in scene.devices)
    with pytest.raises(PlanError, match="device 0: route=.*: must be without an edge"):
        check(plan, scene)


def test_a_route_that_the_model_forbids_is_tried_once_and_named() -> None:
    tried: list[Route] = []

    def attempt(route: Route) -> None:
        tried.append(route)
        raise FedsplitError("cannot be cut there")

    scene = replace(make_scene(), try_route=attempt)
    with pytest.raises(PlanError, match="Changed, round 1, device 0: cannot be cut there"):
        planned(Changed(0), scene)
    assert tried == [Route.two_tier(N_BLOCKS, 2)]
    allowed = replace(make_scene(), try_route=tried.append)
    planned(Changed(0), allowed)
    assert len(tried) == 2, "one route for all devices"


def test_a_codec_that_does_not_exist_is_named() -> None:
    def ratio(settings: Any) -> float:
        if settings["name"] == "none":
            raise FedsplitError("codec.name='none'")
        return 1.0

    scene = replace(make_scene(), codec_ratio=ratio)
    with pytest.raises(PlanError, match="device 3: codec.name='none'"):
        planned(Changed(3, codec=CodecPlan({"name": "none"})), scene)


def test_what_is_no_plan_is_refused() -> None:
    with pytest.raises(PlanError, match="plan='list': must be a RoundPlan"):
        check([], make_scene())  # type: ignore[arg-type]


def test_evaluation_is_checked_too() -> None:
    with pytest.raises(PlanError, match="device 2: steps=0"):
        planned_evaluation(Changed(2, steps=0), make_scene())


@pytest.mark.parametrize("edges", [0, 2])
def test_what_passes_can_be_costed(edges: int) -> None:
    scene = make_scene(edges=edges)
    route = THREE if edges else Route.u_shaped(N_BLOCKS, 1, 4)
    turns: list[Turn] = [scene.turn(device, route) for device in scene.devices]
    shapes: list[Callable[[], RoundPlan]] = [
        lambda: RoundPlan.parallel(turns),
        lambda: RoundPlan.sequential(turns),
        lambda: RoundPlan.grouped([turns[:3], turns[3:]]),
        lambda: RoundPlan((Branch(tuple(turns[:1])),)),
    ]
    for make in shapes:
        plan = check(make(), scene)
        assert scene.timeline(plan).cost.delay_s > 0


def test_a_plan_that_can_be_carried_out_takes_one_look_at_each_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A look at all devices for every turn took 3 s of a round of 10,000."""
    scene = make_scene(50)
    plan = Changed(0).plan_round(scene)
    monkeypatch.setattr(Scene, "devices", property(lambda _: pytest.fail("all devices listed")))
    assert check(plan, scene) == plan


@pytest.mark.parametrize(
    ("cuts", "frozen", "new"),
    [
        ((2, 2, 2), (True, True, True), (False, False, False)),
        ((2, 3, 3), (True, True, True), (False, True, True)),
        ((2, 2, 2), (True, True, False), (True, True, True)),
    ],
    ids=["nobody trains them", "a shorter cut's server does", "another device does"],
)
def test_what_is_held_is_new_where_others_train_the_blocks_before_it(
    cuts: tuple[int, ...], frozen: tuple[bool, ...], new: tuple[bool, ...]
) -> None:
    """In the third round of an epoch each: all samples were shown, but as other boundaries."""
    scene = make_scene(3, steps=None, server_round=3)
    turns = [
        replace(scene.turn(n, Route.two_tier(N_BLOCKS, cut)), frozen=still)
        for n, (cut, still) in enumerate(zip(cuts, frozen, strict=True))
    ]
    plan = check(RoundPlan.parallel(turns), scene)
    found = [branch.turns[0].fresh > 0.5 for branch in plan.branches]
    assert found == list(new)
