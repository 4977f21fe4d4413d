"""What planners predict for a fleet and its channel is what the timeline then charges."""

from dataclasses import replace

import numpy as np
import pytest

from fedsplit.fleet import FleetSpec, ServingSpec, build_fleet, timeline
from fedsplit.plan import CodecPlan, RoundPlan, Route, Turn
from fedsplit.planning.card import plan_card
from fedsplit.planning.costs import CutCosts
from fedsplit.planning.joint import plan_joint
from fedsplit.planning.sft import SftProblem, plan_large_timescale, plan_small_timescale
from fedsplit.planning.system import devices_of, downlink_efficiency, server_of, uplink_snr_hz
from fedsplit.profiles import ModelProfile, UnitProfile
from fedsplit.wireless import Channel, ChannelSpec, uplink_bps
from fedsplit.wireless import downlink_bps as downlink_rate
from tests.planning.planning_scenarios import codec_table

BATCH, STEPS, N_DEVICES, N_BLOCKS = 8, 5, 6, 4
_BLOCK = UnitProfile(
    forward_flops=3e9, backward_flops=4e9, parameter_bytes=3e7, adapter_bytes=1e5,
    optimizer_bytes=2e5, activation_bytes=5e6, boundary_bytes=6e5,
)  # fmt: skip
PROFILE = ModelProfile(
    "blocks",
    197,
    replace(_BLOCK, forward_flops=1e8, backward_flops=0.0, adapter_bytes=0.0, optimizer_bytes=0.0),
    (_BLOCK,) * N_BLOCKS,
    UnitProfile(forward_flops=1e8, backward_flops=1e8, parameter_bytes=1e6),
)


@pytest.fixture(scope="module")
def fleet():
    # Every turn brings its own part of the server's clock, so the server must not divide itself.
    return build_fleet(FleetSpec(devices=N_DEVICES, serving=ServingSpec("unlimited")), seed=3)


@pytest.fixture(scope="module")
def state(fleet):
    places = fleet.devices.positions_m
    return Channel(ChannelSpec(), places, fleet.stations_m, 3, fleet.home).realise(0)


@pytest.fixture(scope="module")
def problem(fleet, state) -> SftProblem:
    server = server_of(fleet)
    return SftProblem(
        costs=CutCosts.from_profile(PROFILE, BATCH),
        devices=devices_of(fleet, STEPS),
        table=codec_table(6),
        max_loss_increase=0.1,
        uplink_snr_hz=uplink_snr_hz(state),
        downlink_efficiency=downlink_efficiency(state),
        uplink_hz=state.uplink_hz,
        downlink_hz=state.downlink_hz,
        server_flops_per_s=server.max_hz * server.flops_per_cycle / N_DEVICES,
        data_weights=fleet.samples,
    )


def _charged_s(fleet, state, cut, ratio, up_hz, down_hz, server_hz) -> float:
    """Return what the timeline says of a parallel round, without the averaging at its end."""
    plan = RoundPlan.parallel(
        Turn(
            device,
            Route.two_tier(N_BLOCKS, int(cut[device])),
            STEPS,
            CodecPlan(uplink={"name": "topk", "ratio": float(ratio[device])}),
            uplink_hz=float(up_hz[device]),
            downlink_hz=float(down_hz[device]),
            server_hz=float(server_hz[device]),
        )
        for device in range(N_DEVICES)
    )
    found = timeline(
        plan, PROFILE, fleet, state, BATCH, codec_ratio=lambda codec: codec.get("ratio", 1.0)
    )
    return found.cost.delay_s - found.aggregation_s


def test_sft_predicts_the_timeline(fleet, state, problem: SftProblem) -> None:
    plan = plan_large_timescale(problem)
    spectrum = plan_small_timescale(problem, plan.cut, plan.ratio)
    clock = np.full(N_DEVICES, fleet.servers.clock_hz[0] / N_DEVICES)
    cut = np.full(N_DEVICES, plan.cut)
    charged = _charged_s(fleet, state, cut, plan.ratio, *spectrum.shares, clock)
    assert charged == pytest.approx(spectrum.objective_s, rel=1e-9)
    even = [np.full(N_DEVICES, band / N_DEVICES) for band in (state.uplink_hz, state.downlink_hz)]
    charged = _charged_s(fleet, state, cut, plan.ratio, *even, clock)
    assert charged == pytest.approx(plan.round_s, rel=1e-9)


def test_the_joint_plan_predicts_the_timeline(fleet, state, problem: SftProblem) -> None:
    plan = plan_joint(problem)
    clock = plan.server_flops_per_s / fleet.servers.flops_per_cycle[0]
    charged = _charged_s(
        fleet, state, plan.cut, plan.ratio, plan.uplink_hz, plan.downlink_hz, clock
    )
    assert charged == pytest.approx(plan.round_s, rel=1e-9)


def test_card_predicts_the_timeline_and_the_servers_energy(fleet, state) -> None:
    plan = plan_card(
        CutCosts.from_profile(PROFILE, BATCH),
        devices_of(fleet, STEPS),
        uplink_bps(state, state.uplink_hz),
        downlink_rate(state, state.downlink_hz),
        server_of(fleet),
        delay_weight=0.5,
    )
    turns = [
        Turn(
            device,
            Route.two_tier(N_BLOCKS, int(plan.cut[device])),
            STEPS,
            server_hz=float(plan.server_hz[device]),
        )
        for device in range(N_DEVICES)
    ]
    cost = timeline(RoundPlan.sequential(turns), PROFILE, fleet, state, BATCH).cost
    assert cost.delay_s == pytest.approx(plan.delay_s.sum(), rel=1e-9)
    assert cost.server_compute_j[0] == pytest.approx(plan.server_energy_j.sum(), rel=1e-9)
