"""How many components a turn finds beside its adapters, from the plan alone."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from fedsplit.growth import FEDEX, LEAVE_RESIDUALS, STACKING
from fedsplit.plan import Branch, RoundPlan, Route, Turn
from fedsplit.profiles import LowRank
from fedsplit.schemes import LocalWork, Scene, Scheme, check
from fedsplit.schemes.turnout import Waiting, turn_out
from fedsplit.testing.scenes import make_scene

RANKS = {0: 2, 1: 4, 2: 8}


def scene_of(how: str, residual: int = 0, ranks: Mapping[int, int] = RANKS) -> Scene:
    """Three devices, whose model has adapters of rank 8."""
    scene, work = make_scene(3), LocalWork(batch_size=4, steps=2, ranks=ranks, averaged=how)
    profile = replace(scene.profile, rank=8)
    return replace(scene, work=work, profile=profile, residual=residual)


def turns(scene: Scene) -> list[Turn]:
    route = Route.two_tier(scene.n_blocks, 2)
    return [scene.turn(device, route) for device in scene.devices]


class Planned(Scheme):
    """Parallel branches; or one branch of two waves of all devices."""

    def __init__(self, waves: bool) -> None:
        self._waves = waves

    def plan_round(self, scene: Scene) -> RoundPlan:
        if self._waves:
            return RoundPlan.hierarchical([turns(scene)], rounds=2)
        return RoundPlan.parallel(turns(scene))


@pytest.mark.parametrize(
    ("how", "waves", "begun", "left"),
    [
        ("mean", False, [5, 5, 5], 5),
        (FEDEX, False, [5, 5, 5], 5 + 4 + 8),
        (STACKING, False, [5, 5, 5], 5 + 2 + 4 + 8),
        (FEDEX, True, [5, 5, 5, 17, 17, 17], 17 + 12),
        # What comes of a branch is aggregated by itself, which stacks it once more.
        (STACKING, True, [5, 5, 5, 19, 19, 19], 19 + 14 + 8),
    ],
)
def test_residuals_grow_with_what_is_averaged(
    how: str, waves: bool, begun: list[int], left: int
) -> None:
    turnout = turn_out(Planned(waves), scene_of(how, residual=5))
    found = [turn.residual for branch in turnout.plan.branches for turn in branch.turns]
    assert (found, turnout.residual) == (begun, left)


def test_only_what_is_in_time_adds_to_them() -> None:
    turnout = turn_out(Planned(False), scene_of(STACKING), Waiting(quorum_devices=2))
    there = {0, 1, 2} - set(turnout.late)
    assert turnout.residual == sum(RANKS[device] for device in there)


@pytest.mark.parametrize("how", LEAVE_RESIDUALS)
def test_of_branches_apart_all_residuals_add_up(how: str) -> None:
    scene = scene_of(how, residual=3, ranks={})
    first, second, third = turns(scene)

    class Apart(Scheme):
        def plan_round(self, scene: Scene) -> RoundPlan:
            return RoundPlan((Branch((first, second), 2), Branch((third,))))

    grown = 8 if how == FEDEX else 16
    assert turn_out(Apart(), scene).residual == (3 + grown) + 3 + grown


def test_what_a_scheme_says_of_residuals_does_not_count() -> None:
    scene = scene_of("mean")
    plan = RoundPlan.parallel(replace(turn, residual=7) for turn in turns(scene))
    assert {branch.turns[0].residual for branch in check(plan, scene).branches} == {0}


def test_a_scheme_plans_with_their_weight_and_the_plan_is_costed_with_it_once() -> None:
    scene = scene_of(FEDEX, residual=16)
    unit = scene.profile.blocks[0]
    heavy = replace(unit, low_rank=(LowRank(n_bytes=1e6, forward_flops=1e9, most=9),))
    scene = replace(scene, profile=replace(scene.profile, blocks=(heavy,) * scene.n_blocks))
    seen = []

    class Looking(Planned):
        def plan_round(self, scene: Scene) -> RoundPlan:
            plan = super().plan_round(scene)
            seen.append((scene.profile.blocks[0].parameter_bytes, scene.timeline(plan)))
            return plan

    turnout = turn_out(Looking(False), scene)
    ((weight, line),) = seen
    assert weight == heavy.parameter_bytes + 2e6
    for name in ("device_memory_bytes", "device_compute_s", "server_compute_j"):
        assert getattr(line.cost, name) == pytest.approx(getattr(turnout.line.cost, name))
