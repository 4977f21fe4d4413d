"""Situations to plan for, without a model: a profile by hand, a sampled fleet, a real channel."""

from collections.abc import Iterable
from dataclasses import replace

from hypothesis import strategies as st

from fedsplit.fleet import FleetSpec, RoundCost, build_fleet, timeline
from fedsplit.flower import LocalWork, Scene
from fedsplit.plan import RoundPlan
from fedsplit.profiles import ModelProfile, UnitProfile
from fedsplit.wireless import Channel, ChannelSpec, MobilitySpec

N_BLOCKS = 6
MIXED = ("jetson_nano", "jetson_orin_nano", "jetson_agx_orin")


def profile() -> ModelProfile:
    """Return a model of six equal blocks: a block computes 3 MFLOP and holds 4 MB per sample."""
    unit = UnitProfile(1e6, 2e6, 8e6, 4e4, 8e4, 4e6, 1e5, 1e6)
    return ModelProfile(
        "by hand", 16, replace(unit, forward_flops=0, backward_flops=0), (unit,) * N_BLOCKS, unit
    )


def make_scene(
    devices: int = 6,
    *,
    edges: int = 0,
    seed: int = 0,
    server_round: int = 1,
    present: Iterable[int] | None = None,
    steps: int | None = 2,
    walking: bool = False,
    ring_m: float = 500.0,
) -> Scene:
    """Return a round of a mixed fleet with unequal data, of which `present` take part."""
    spec = FleetSpec(
        devices=devices,
        edges=edges,
        edge_ring_m=ring_m,
        types=MIXED,
        clock=(0.3, 1),
        samples=(20, 200),
    )
    fleet = build_fleet(spec, seed)
    mobility = MobilitySpec(enabled=walking, side_m=400.0)
    positions = fleet.devices.positions_m
    channel = Channel(ChannelSpec(mobility=mobility), positions, fleet.stations_m, seed, fleet.home)
    samples = {
        device: int(fleet.samples[device])
        for device in (range(devices) if present is None else present)
    }
    return Scene(
        server_round,
        samples,
        LocalWork(batch_size=4, steps=steps),
        profile(),
        fleet,
        channel.realise(server_round),
        channel.mean,
        seed=seed,
    )


def cost(plan: RoundPlan, scene: Scene) -> RoundCost:
    """Return what the plan costs; refuses one that gives away more than the bands."""
    return timeline(
        plan, scene.profile, scene.fleet, scene.channel, scene.work.batch_size, scene.codec_ratio
    ).cost


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
