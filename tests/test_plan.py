"""Routes say where every block runs; a route that cannot run is refused by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.plan import DEVICE, SERVER, Route, Segment


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
