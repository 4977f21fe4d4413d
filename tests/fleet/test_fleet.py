"""Fleets as described, fleets as sampled, and descriptions that make no sense."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.fleet import DEVICES, SERVERS, DeviceSpec, FleetSpec, Processor, build_fleet

OWN = Processor(1000, 1e8, 1e9, 1e9, 8.0)


@pytest.mark.parametrize("name", [*DEVICES, *SERVERS])
def test_every_processor_of_the_catalogue_says_where_it_is_from(name):
    source = {**DEVICES, **SERVERS}[name].source
    assert "read:" in source or "remembered:" in source


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        # Peak FP32 figures as the makers quote them.
        ("rtx_4060_ti", 22.1), ("rtx_a6000", 38.7), ("jetson_agx_orin", 5.3),
        ("jetson_orin_nano", 1.28), ("jetson_nano", 0.24), ("a100", 19.5), ("h100", 66.9),
        ("snapdragon_8_gen2", 3.48), ("apple_a16", 1.79),
    ],
)  # fmt: skip
def test_peak_is_the_makers(name, tflops):
    made = {**DEVICES, **SERVERS}[name]
    assert made.flops_per_cycle * made.max_hz == pytest.approx(tflops * 1e12, rel=0.02)


def test_energy_coefficient_gives_the_power_at_the_highest_clock():
    assert OWN.energy_coefficient * OWN.max_hz**3 == pytest.approx(OWN.power_w)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 40),
    edges=st.integers(0, 4),
    random=st.booleans(),
    low=st.floats(0, 1),
)
def test_sampled_fleets_stay_inside_their_description(seed, n, edges, random, low):
    spec = FleetSpec(
        devices=n,
        types=("jetson_nano", "apple_a16"),
        types_by="random" if random else "rotation",
        clock=(low, 1.0),
        samples=(10, 30),
        edges=edges,
        utilisation=0.5,
    )
    fleet = build_fleet(spec, seed)
    assert fleet.n_devices == n
    assert fleet.n_edges == edges
    distance = np.linalg.norm(fleet.devices.positions_m - fleet.stations_m[fleet.home], axis=1)
    assert np.all((distance >= 50 - 1e-9) & (distance <= 250 + 1e-9))
    assert np.all((fleet.samples >= 10) & (fleet.samples <= 30))
    for i, name in enumerate(fleet.devices.names):
        floor = max(DEVICES[name].min_hz, low * DEVICES[name].max_hz)
        assert floor - 1 <= fleet.devices.clock_hz[i] <= DEVICES[name].max_hz
        most = 0.5 * DEVICES[name].flops_per_cycle * DEVICES[name].max_hz
        assert fleet.devices.flops[i] <= most * (1 + 1e-9)
    if not random:
        assert fleet.devices.names == tuple(spec.types[i % 2] for i in range(n))
    again = build_fleet(spec, seed)
    assert np.array_equal(fleet.devices.positions_m, again.devices.positions_m)
    assert np.array_equal(fleet.devices.clock_hz, again.devices.clock_hz)


def test_devices_stand_uniformly_over_the_area():
    fleet = build_fleet(FleetSpec(devices=50_000, min_distance_m=0.0, radius_m=100.0), 1)
    distance = np.linalg.norm(fleet.devices.positions_m, axis=1)
    # Half of the area lies within radius / sqrt(2).
    assert np.mean(distance < 100 / np.sqrt(2)) == pytest.approx(0.5, abs=0.01)


def test_edges_stand_on_their_ring_and_share_the_devices_out():
    fleet = build_fleet(FleetSpec(devices=10, edges=5, edge_ring_m=300.0), 0)
    assert np.bincount(fleet.home).tolist() == [2] * 5
    assert np.linalg.norm(fleet.servers.positions_m[1:], axis=1) == pytest.approx(300)
    assert fleet.servers.positions_m[0].tolist() == [0, 0]


def test_fleet_described_device_by_device_with_own_processors():
    members = (
        DeviceSpec("mine", (290.0, 0.0), clock_hz=5e8, samples=7),
        DeviceSpec("jetson_nano", (-290.0, 1.0)),
    )
    spec = FleetSpec(
        devices=2, members=members, edges=2, edge_ring_m=300.0, processors={"mine": OWN}
    )
    fleet = build_fleet(spec)
    assert fleet.devices.names == ("mine", "jetson_nano")
    assert fleet.devices.clock_hz.tolist() == [5e8, DEVICES["jetson_nano"].max_hz]
    assert fleet.samples.tolist() == [7, 100]
    # Each belongs to the nearest edge: 0 in the east, 1 in the west.
    assert fleet.home.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"devices": 0}, "fleet.devices=0: must be at least 1"),
        ({"types": ("abacus",)}, "fleet.types='abacus': must be one of jetson_nano"),
        ({"server": "abacus"}, "fleet.server='abacus'"),
        ({"clock": (0.5, 1.5)}, "fleet.clock=.*: must be two values, in order, from 0 to 1"),
        ({"samples": (5, 2)}, "fleet.samples"),
        ({"utilisation": 0.0}, "fleet.utilisation=0.0: must be in"),
        ({"utilisation": float("nan")}, "fleet.utilisation=nan"),
        ({"backhaul_bps": -1.0}, "fleet.backhaul_bps=-1.0"),
        ({"min_distance_m": 300.0}, "fleet.min_distance_m=300.0: must be from 0 to radius_m=250"),
        ({"edge_ring_m": float("inf")}, "fleet.edge_ring_m=inf"),
        ({"types_by": "taste"}, "fleet.types_by='taste': must be one of rotation, random"),
        ({"members": (DeviceSpec("a100", (0.0, 0.0)),)}, "fleet.devices=4: must be 1, as many as"),
        (
            {"members": (DeviceSpec("a100", (0.0, float("nan"))),), "devices": 1},
            r"members\[0\].position_m",
        ),
        (
            {"members": (DeviceSpec("a100", (0.0, 0.0), 1e12),), "devices": 1},
            r"members\[0\].clock_hz=10{12}",
        ),
        (
            {"members": (DeviceSpec("a100", (0.0, 0.0), None, -1),), "devices": 1},
            r"members\[0\].samples=-1",
        ),
    ],
)
def test_bad_descriptions_are_named(change, named):
    with pytest.raises(FedsplitError, match=named):
        FleetSpec(**change)


@pytest.mark.parametrize("field", ["flops_per_cycle", "max_hz", "memory_bytes", "power_w"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_processors_are_named(field, value):
    good = {"flops_per_cycle": 1.0, "min_hz": 1.0, "max_hz": 2.0, "memory_bytes": 1.0}
    with pytest.raises(FedsplitError, match=f"processor.{field}="):
        Processor(**{**good, "power_w": 1.0, field: value})
