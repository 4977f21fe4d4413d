"""What a round costs where frozen factors are beside the adapters."""

from dataclasses import replace

import pytest

from fedsplit.plan import Branch, RoundPlan, Route
from fedsplit.profiles import LowRank, ModelProfile, UnitProfile
from fedsplit.testing.scenes import make_scene

close = pytest.approx


def with_low_rank(profile: ModelProfile) -> ModelProfile:
    """Adapters of rank 8, all of them factors, of matrices that have 32 components."""

    def made(unit: UnitProfile) -> UnitProfile:
        return replace(unit, low_rank=(LowRank(unit.adapter_bytes, unit.forward_flops / 50, 4.0),))

    embed, *blocks, head = map(made, profile.units)
    return replace(profile, embed=embed, blocks=tuple(blocks), head=head, rank=8)


def test_a_residual_goes_down_is_held_and_computed_with_but_does_not_come_back() -> None:
    scene = make_scene(2, edges=1)
    profile = with_low_rank(scene.profile)
    scene = replace(scene, profile=profile)
    route = Route.three_tier(scene.n_blocks, 2, 3)
    plans = {
        residual: RoundPlan.parallel(
            replace(scene.turn(device, route), residual=residual) for device in (0, 1)
        )
        for residual in (0, 16, 32, 100)
    }
    none, some, all_, more = (scene.timeline(plan).cost for plan in plans.values())
    device, edge, cloud = (part.adapter_bytes for part in profile.segments(route))
    for n in (0, 1):
        assert some.downlink_bytes[n] - none.downlink_bytes[n] == close(2 * device)
        assert some.uplink_bytes[n] == none.uplink_bytes[n]
        assert some.device_memory_bytes[n] - none.device_memory_bytes[n] == close(2 * device)
        # A fiftieth of the forward pass for each 8 components, forward and backward.
        flops = 2 * 2 * profile.segments(route)[0].forward_flops / 50
        seconds = some.device_compute_s[n] - none.device_compute_s[n]
        steps = 2 * scene.work.batch_size
        assert seconds == close(steps * flops / scene.fleet.devices.flops[n])
    assert some.backhaul_bytes.sum() - none.backhaul_bytes.sum() == close(4 * (device + edge))
    heavier = some.server_memory_bytes - none.server_memory_bytes
    assert heavier == close([2 * cloud, 2 * edge])  # once for both, who began with the same
    assert all_.downlink_bytes == close(more.downlink_bytes)


def test_branches_that_averaged_have_residuals_of_their_own() -> None:
    scene = make_scene(4)
    profile = with_low_rank(scene.profile)
    route = Route.two_tier(scene.n_blocks, 2)
    turns = [replace(scene.turn(n, route), residual=8) for n in range(4)]
    later = [replace(turn, residual=16, repeat=1) for turn in turns]
    branches = [Branch((*turns[n : n + 2], *later[n : n + 2]), 2) for n in (0, 2)]
    costs = [
        replace(scene, profile=one).timeline(RoundPlan(tuple(branches))).cost
        for one in (profile, scene.profile)
    ]
    server = profile.segments(route)[1].adapter_bytes
    more = costs[0].server_memory_bytes[0] - costs[1].server_memory_bytes[0]
    assert more == close(2 * 2 * server)
