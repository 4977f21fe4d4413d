"""Random rounds for the tests of the timeline."""

import numpy as np
from hypothesis import strategies as st

from fedsplit.fleet import FleetSpec, ServingSpec, build_fleet
from fedsplit.plan import Branch, RoundPlan, Route, Turn
from fedsplit.profiles import ModelProfile, UnitProfile
from fedsplit.wireless import Channel, ChannelSpec

N_BLOCKS = 5
TYPES = ("jetson_nano", "jetson_orin_nano", "jetson_agx_orin", "apple_a16")


def random_profile(seed, n_blocks=N_BLOCKS):
    rng = np.random.default_rng(seed)

    def unit(scale):
        forward, backward, weights, adapters, optimizer, activations, boundary = rng.uniform(
            0.5, 2, 7
        )
        return UnitProfile(
            forward * 1e9 * scale,
            backward * 1.5e9 * scale,
            weights * 1e7,
            adapters * 1e5,
            optimizer * 2e5,
            activations * 1e6,
            boundary * 4e5,
        )

    return ModelProfile(
        "random", 64, unit(0.1), tuple(unit(1.0) for _ in range(n_blocks)), unit(0.5)
    )


def random_fleet(seed, n_devices, edges=0, discipline="fifo", **settings):
    spec = FleetSpec(
        devices=n_devices,
        types=TYPES,
        clock=(0.5, 1.0),
        edges=edges,
        serving=ServingSpec(discipline),
        **settings,
    )
    return build_fleet(spec, seed)


def random_state(seed, fleet, round_=0):
    spec = ChannelSpec(downlink_hz=30e6, shadowing_db=4.0)
    positions = fleet.devices.positions_m
    return Channel(spec, positions, fleet.stations_m, seed, fleet.home).realise(round_)


@st.composite
def routes(draw, edges):
    cuts = sorted(draw(st.tuples(st.integers(0, N_BLOCKS), st.integers(0, N_BLOCKS))))
    kinds = ["two_tier", "device_only", "u_shaped", *(["three_tier"] if edges else [])]
    match draw(st.sampled_from(kinds)):
        case "two_tier":
            return Route.two_tier(N_BLOCKS, cuts[0])
        case "device_only":
            return Route.device_only(N_BLOCKS)
        case "u_shaped":
            return Route.u_shaped(N_BLOCKS, *cuts)
        case _:
            return Route.three_tier(N_BLOCKS, *cuts)


@st.composite
def branches(draw, devices, edges):
    """Draw how `devices` train: one after the other, or side by side and several times."""
    width, times = draw(st.integers(1, len(devices))), draw(st.integers(1, 2))
    if width == times == 1:
        return Branch(tuple(Turn(n, draw(routes(edges)), draw(st.integers(0, 4))) for n in devices))
    route = draw(routes(edges))
    edge = draw(st.integers(0, edges - 1)) if edges else None
    steps = {n: draw(st.integers(0, 4)) for n in devices}
    turns = (Turn(n, route, steps[n], edge=edge, repeat=r) for r in range(times) for n in devices)
    return Branch(tuple(turns), width)


@st.composite
def rounds(draw, disciplines=("fifo", "sharing", "partition", "unlimited")):
    """Draw a plan of any shape, with its profile, fleet and channel state."""
    seed = draw(st.integers(0, 10_000))
    edges = draw(st.sampled_from([0, 2]))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    fleet = random_fleet(seed, sum(sizes), edges, draw(st.sampled_from(disciplines)))
    devices = iter(draw(st.permutations(range(sum(sizes)))))
    plan = RoundPlan(tuple(draw(branches([next(devices) for _ in range(s)], edges)) for s in sizes))
    return plan, random_profile(seed), fleet, random_state(seed, fleet)
