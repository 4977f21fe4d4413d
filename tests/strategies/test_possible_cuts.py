"""Schemes that choose cuts choose among those that the model allows."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from fedsplit.strategies.card import Card
from fedsplit.strategies.fast import Fast
from fedsplit.strategies.joint import Joint
from fedsplit.strategies.sft import Sft
from fedsplit.strategies.splitfed import SplitFed
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.plan import RoundPlan, Route
from fedsplit.schemes import Scene, Scheme
from tests.strategies.scenes import N_BLOCKS, cost, make_scene

SCHEMES: dict[str, Scheme] = {
    "card": Card(delay_weight=0.9),
    "fast": Fast(),
    "joint": Joint(),
    "sft": Sft(),
    "alm": Sft(solver="alm"),
    "rule": SplitFed(cut="fast"),
}
possible = st.sets(st.integers(0, N_BLOCKS - 1), min_size=1).map(sorted)


def wide_scene(cuts: Sequence[int] | None, seed: int = 0) -> Scene:
    """Return a round on so much band that most devices gain by the server."""
    scene = make_scene(5, seed=seed)
    state = scene.channel
    wide = replace(state, uplink_hz=300 * state.uplink_hz, downlink_hz=300 * state.downlink_hz)
    ask = None if cuts is None else lambda: cuts
    return replace(scene, channel=wide, mean_channel=lambda _: wide, possible_cuts=ask)


def cuts_of(plan: RoundPlan) -> list[int]:
    return [turn.route.segments[0].stop for branch in plan.branches for turn in branch.turns]


@pytest.mark.parametrize("name", SCHEMES)
@settings(max_examples=12, deadline=None)
@given(cuts=possible, seed=st.integers(0, 20))
def test_no_other_cut_is_planned(name: str, cuts: list[int], seed: int) -> None:
    scheme = SCHEMES[name]
    if name in ("sft", "alm") and max(cuts) < 1:
        with pytest.raises(FedsplitError, match="min_cut=1: must leave a cut .* allows: 0"):
            scheme.plan_round(wide_scene(cuts, seed))
        return
    found = cuts_of(scheme.plan_round(wide_scene(cuts, seed)))
    assert set(found) <= {*cuts, N_BLOCKS}
    free = cuts_of(scheme.plan_round(wide_scene(None, seed)))
    if name != "alm" and set(free) <= {*cuts, N_BLOCKS}:
        assert found == free


def assert_fastest(plan: RoundPlan, scene: Scene, cuts: Sequence[int]) -> None:
    """Every device's turn takes least time, alone, of all with one of `cuts`, or the whole."""
    for branch in plan.branches:
        for turn in branch.turns:
            routes = {cut: Route.at_cut(N_BLOCKS, cut) for cut in (*cuts, N_BLOCKS)}
            delays = {
                cut: cost(RoundPlan.parallel([scene.turn(turn.device, route)]), scene).delay_s
                for cut, route in routes.items()
            }
            chosen = turn.route.segments[0].stop
            assert delays[chosen] == pytest.approx(min(delays.values()), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(cuts=possible, seed=st.integers(0, 20), floor=st.integers(0, 2))
def test_fast_finds_the_best_of_the_possible_cuts(cuts: list[int], seed: int, floor: int) -> None:
    scene = wide_scene(cuts, seed)
    plan = Fast(min_blocks=floor).plan_round(scene)
    assert_fastest(plan, scene, [cut for cut in cuts if cut >= floor])


@settings(max_examples=20, deadline=None)
@given(cuts=possible, seed=st.integers(0, 20))
def test_card_finds_the_fastest_of_the_possible_cuts(cuts: list[int], seed: int) -> None:
    scene = wide_scene(cuts, seed)
    assert_fastest(Card(delay_weight=1.0, min_cut=0).plan_round(scene), scene, cuts)
