"""Routes say where every block runs; a route that cannot run is refused by name."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.plan import DEVICE, EDGE, SERVER, AdapterWay, Branch, RoundPlan, Route, Segment, Turn


@st.composite
def routes(draw: st.DrawFn) -> Route:
    n_blocks = draw(st.integers(1, 40))
    cuts = sorted(draw(st.lists(st.integers(0, n_blocks), min_size=2, max_size=2)))
    shape = draw(st.sampled_from(["two_tier", "three_tier", "u_shaped", "device_only"]))
    if shape == "two_tier":
        return Route.two_tier(n_blocks, cuts[0])
    if shape == "device_only":
        return Route.device_only(n_blocks)
    return getattr(Route, shape)(n_blocks, *cuts)


@given(routes())
def test_a_route_reads_back_what_it_writes(route: Route) -> None:
    assert Route.parse(str(route), route.n_blocks) == route


@given(routes())
def test_every_block_runs_exactly_once(route: Route) -> None:
    blocks = [block for segment in route.segments for block in range(segment.start, segment.stop)]
    assert blocks == list(range(route.n_blocks))
    assert len(route.cuts) == len(route.segments) - 1


def test_labels_stay_home_only_on_routes_that_return() -> None:
    assert Route.u_shaped(8, 2, 6).returns_home
    assert not Route.two_tier(8, 2).returns_home
    assert not Route.device_only(8).returns_home
    assert Route.u_shaped(8, 2, 6).on(DEVICE) == (Segment(DEVICE, 0, 2), Segment(DEVICE, 6, 8))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("device[0:2] -> server[3:8]", "does not start at block 2"),
        ("device[0:2] -> server[2:7]", "end at block 8"),
        ("device[0:2] -> moon[2:8]", "moon"),
        ("server[0:8]", "starts at the device"),
        ("device[0:2] -> device[2:4] -> server[4:8]", "visits each server once"),
        ("device[0:2] -> server[2:4] -> edge[4:6] -> server[6:8]", "visits each server once"),
        ("device 0..8", "form"),
    ],
)
def test_a_route_that_cannot_run_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(FedsplitError, match=complaint):
        Route.parse(text, 8)


def test_a_cut_beyond_the_model_is_refused() -> None:
    with pytest.raises(FedsplitError):
        Route.two_tier(4, 5)
    assert Route.two_tier(4, 4).on(SERVER) == (Segment(SERVER, 4, 4),)


def test_at_cut_leaves_the_server_out_when_the_device_has_all_blocks() -> None:
    assert Route.at_cut(3, 2) == Route.two_tier(3, 2)
    assert Route.at_cut(3, 3) == Route.device_only(3)


def _turn(device: int, cut: int = 1, edge: int | None = 0, repeat: int = 0) -> Turn:
    return Turn(device, Route.three_tier(8, cut, 4), 1, edge=edge, repeat=repeat)


def test_waves_are_cut_from_the_turns_in_order() -> None:
    branch = Branch(tuple(_turn(device) for device in range(5)), width=2)
    assert [[turn.device for turn in wave] for wave in branch.waves] == [[0, 1], [2, 3], [4]]
    assert [len(wave) for wave in Branch(branch.turns).waves] == [1] * 5


def test_a_hierarchical_plan_repeats_its_groups_and_names_each_device_once() -> None:
    plan = RoundPlan.hierarchical([[_turn(0), _turn(1)], [_turn(2, edge=1)]], 3)
    assert plan.devices == (0, 1, 2)
    assert [len(branch.waves) for branch in plan.branches] == [3, 3]
    assert [turn.repeat for turn in plan.branches[0].turns] == [0, 0, 1, 1, 2, 2]
    assert all(branch.way is AdapterWay.EDGE for branch in plan.branches)


def test_adapters_stay_at_an_edge_only_if_it_has_something_to_average() -> None:
    two_tier = Turn(0, Route.two_tier(8, 2), 1)
    assert Branch((_turn(0), _turn(1))).way is not AdapterWay.EDGE
    assert Branch((two_tier, replace(two_tier, device=1)), width=2).way is not AdapterWay.EDGE
    assert Branch((two_tier, replace(two_tier, device=1)), width=2).way is AdapterWay.LINK
    assert Branch((_turn(0), _turn(0, repeat=1))).way is AdapterWay.EDGE


@pytest.mark.parametrize(
    ("turns", "width", "complaint"),
    [
        ((_turn(0),), 0, "branch width=0"),
        ((_turn(0), _turn(0, repeat=1)), 2, "wave devices.*each device once"),
        ((_turn(0), _turn(1), _turn(0), _turn(1)), 2, "repeat.*different from each other"),
        ((_turn(0), _turn(1, edge=1)), 2, "branch edges.*one edge"),
        (
            (_turn(0), replace(_turn(1), route=Route.three_tier(8, 1, 5))),
            2,
            "branch routes.*one segment behind the edge",
        ),
        (
            (
                Turn(0, Route.through(8, (1,), (DEVICE, EDGE)), 1),
                Turn(1, Route.device_only(8), 1),
            ),
            2,
            "branch routes.*over an edge, if one of them is",
        ),
    ],
)
def test_waves_that_cannot_be_averaged_are_refused(
    turns: tuple[Turn, ...], width: int, complaint: str
) -> None:
    with pytest.raises(FedsplitError, match=complaint):
        Branch(turns, width)


def test_the_cut_on_the_device_may_differ_within_a_wave() -> None:
    assert Branch((_turn(0, cut=1), _turn(1, cut=2)), width=2).way is AdapterWay.EDGE


def test_a_device_belongs_to_one_branch() -> None:
    with pytest.raises(FedsplitError, match="each device in one branch"):
        RoundPlan((Branch((_turn(0),)), Branch((_turn(0, repeat=1),))))
    with pytest.raises(FedsplitError, match="rounds=0"):
        RoundPlan.hierarchical([[_turn(0)]], 0)
