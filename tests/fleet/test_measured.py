"""Measured machines: their times replace FLOPs, and a file keeps them."""

from dataclasses import replace

import numpy as np
import pytest

from fedsplit.errors import FedsplitError
from fedsplit.fleet import FleetSpec, build_fleet, measured_fleet, timeline
from fedsplit.measured import MeasuredProfile
from fedsplit.models import ModelSpec
from fedsplit.models.profile_measured import measure_machine
from fedsplit.plan import DEVICE, EDGE, SERVER, RoundPlan, Route, Turn
from tests.fleet.fleet_scenarios import N_BLOCKS, random_fleet, random_profile, random_state

BATCH = 8
TIMES = MeasuredProfile(
    model="random",
    seq_len=64,
    batch=4,
    forward_s=(0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 0.25),
    backward_s=(0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.75),
)


@pytest.mark.parametrize("tiers", [("device",), ("server",), ("device", "server")])
def test_a_measured_tier_takes_the_seconds_that_it_takes(tiers):
    profile, fleet = random_profile(0), random_fleet(0, 1)
    plan = RoundPlan.parallel([Turn(0, Route.two_tier(N_BLOCKS, 2), 3)])
    state = random_state(0, fleet)
    counted = timeline(plan, profile, fleet, state, BATCH).cost
    found = timeline(plan, profile, fleet, state, BATCH, measured=dict.fromkeys(tiers, TIMES)).cost
    both = [up + down for up, down in zip(TIMES.forward_s, TIMES.backward_s, strict=True)]
    own = {"device": sum(both[:3]), "server": sum(both[3:])}
    expected = {tier: 3 * BATCH / TIMES.batch * seconds for tier, seconds in own.items()}
    for tier, name in (("device", "device_compute_s"), ("server", "server_compute_s")):
        wanted = expected[tier] if tier in tiers else getattr(counted, name)[0]
        assert getattr(found, name)[0] == pytest.approx(wanted)
    assert found.uplink_bytes == pytest.approx(counted.uplink_bytes)
    # Power times time, as at any load.
    watts = counted.device_compute_j[0] / counted.device_compute_s[0]
    assert found.device_compute_j[0] == pytest.approx(watts * found.device_compute_s[0])


def test_a_fleet_takes_the_speed_memory_and_power_that_its_devices_measured():
    profile, fleet = random_profile(0), random_fleet(0, 3)
    told = replace(TIMES, memory_bytes=5e9, power_w=7.0)
    found = measured_fleet(fleet, profile, {(DEVICE, 1): told})
    route = Route.device_only(N_BLOCKS)
    plan = RoundPlan.parallel([Turn(n, route, 3) for n in range(3)])
    state = random_state(0, fleet)
    before, after = (timeline(plan, profile, one, state, BATCH).cost for one in (fleet, found))
    seconds = 3 * BATCH / TIMES.batch * (sum(TIMES.forward_s) + sum(TIMES.backward_s))
    assert after.device_compute_s[1] == pytest.approx(seconds)
    assert after.device_compute_j[1] == pytest.approx(7.0 * seconds)
    assert found.devices.memory_bytes[1] == 5e9
    for others in ([0], [2]):
        assert after.device_compute_s[others] == before.device_compute_s[others]
        assert found.devices.memory_bytes[others] == fleet.devices.memory_bytes[others]


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 65},
        {"forward_s": (1.0, 1.0), "backward_s": (1.0, 1.0)},
        {"forward_s": (0.0,) * 7, "backward_s": (0.0,) * 7},
        {"forward_s": (1e300,) * 7},
        {"forward_s": (1e-300,) * 7, "backward_s": (0.0,) * 7},
    ],
)
def test_what_does_not_fit_the_model_or_no_machine_can_be_changes_nothing(change):
    profile, fleet = random_profile(0), random_fleet(0, 3)
    changed = replace(TIMES, **change)
    found = measured_fleet(fleet, profile, {(DEVICE, 1): changed, (SERVER, 0): changed})
    for before, after in ((fleet.devices, found.devices), (fleet.servers, found.servers)):
        assert np.array_equal(before.flops, after.flops)
        assert np.array_equal(before.memory_bytes, after.memory_bytes)


def test_servers_and_edges_take_what_they_measured_and_an_edge_too_many_nothing():
    fleet = build_fleet(FleetSpec(devices=4, edges=2))
    profile = random_profile(0)
    whole = sum(TIMES.forward_s) + sum(TIMES.backward_s)
    counted = profile.total()
    speed = TIMES.batch * (counted.forward_flops + counted.backward_flops) / whole
    told = replace(TIMES, memory_bytes=5e9)
    found = measured_fleet(fleet, profile, {(SERVER, 0): told, (EDGE, 1): told, (EDGE, 2): told})
    was = fleet.servers.flops
    assert found.servers.flops == pytest.approx([speed, was[1], speed])
    assert found.servers.memory_bytes[[0, 2]] == pytest.approx(5e9)
    assert np.array_equal(found.devices.flops, fleet.devices.flops)


def test_what_is_computed_again_takes_its_time_again():
    profile = random_profile(0).checkpointed()
    seconds = sum(TIMES.forward_s) + sum(TIMES.backward_s) + sum(TIMES.forward_s[1:-1])
    counted = profile.total()
    flops = TIMES.batch * (counted.forward_flops + counted.backward_flops)
    assert TIMES.flops_per_s(profile) == pytest.approx(flops / seconds)


def test_a_machine_is_measured_and_its_file_read_back(tmp_path):
    spec = ModelSpec(model_type="gpt2", config={"n_layer": 2, "n_embd": 32, "n_head": 2}, r=2)
    found = measure_machine(spec, seq_len=16, batch=2, repeats=2)
    assert len(found.forward_s) == len(found.backward_s) == 4
    assert min(found.forward_s) > 0
    assert found.memory_bytes > 1e8
    found.write(tmp_path / "machine.json")
    assert MeasuredProfile.read(tmp_path / "machine.json") == found


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "measured profile"),
        ("[]", "mapping"),
        (
            '{"model": "m", "seq_len": 8, "batch": 1, "forward_s": [1], "backward_s": [1]}',
            "forward",
        ),
        (
            '{"model": "m", "seq_len": 8, "batch": 1, "forward_s": [1, 2], "backward_s": [1, -2]}',
            "backward_s",
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, named):
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(FedsplitError, match=named):
        MeasuredProfile.read(path)
    with pytest.raises(FedsplitError):
        MeasuredProfile.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    "change", [{"seq_len": 8}, {"forward_s": (1.0, 2.0), "backward_s": (1.0, 2.0)}]
)
def test_times_of_another_model_are_refused(change):
    profile, fleet = random_profile(0), random_fleet(0, 1)
    plan = RoundPlan.parallel([Turn(0, Route.two_tier(N_BLOCKS, 2), 3)])
    with pytest.raises(FedsplitError, match="measured"):
        timeline(
            plan,
            profile,
            fleet,
            random_state(0, fleet),
            BATCH,
            measured={"device": replace(TIMES, **change)},
        )
