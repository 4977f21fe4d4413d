"""Any situation, and what a plan costs in it."""

from hypothesis import strategies as st

from fedsplit.fleet import RoundCost
from fedsplit.plan import RoundPlan
from fedsplit.schemes import Scene
from fedsplit.testing.scenes import MIXED, N_BLOCKS, make_scene, profile

__all__ = ["MIXED", "N_BLOCKS", "cost", "make_scene", "profile", "scenes"]


def cost(plan: RoundPlan, scene: Scene) -> RoundCost:
    """Return what the plan costs; refuses one that gives away more than the bands."""
    return scene.timeline(plan).cost


@st.composite
def scenes(draw: st.DrawFn, edges: st.SearchStrategy[int] = st.just(0)) -> Scene:  # noqa: B008
    """Return any round of any fleet in which some of the devices take part."""
    devices = draw(st.integers(1, 9))
    present = draw(st.sets(st.integers(0, devices - 1), min_size=1))
    return make_scene(
        devices,
        edges=draw(edges),
        seed=draw(st.integers(0, 1000)),
        server_round=draw(st.integers(1, 30)),
        present=sorted(present),
        steps=draw(st.sampled_from([None, 1, 3])),
    )
