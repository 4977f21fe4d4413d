"""What a way to train costs a planner is what the timeline finds of such turns."""

from dataclasses import replace

import numpy as np
import pytest

from fedsplit.plan import RoundPlan, Route
from fedsplit.planning import CodecTable, CutCosts, Way, ways_to_train
from fedsplit.schemes import Scene, check
from fedsplit.testing.scenes import N_BLOCKS, make_scene

TABLE = CodecTable(
    np.ones(1),
    np.zeros(1),
    ({"name": "identity"},),
    ranks={2: 0.1, 16: 0.0},
    frozen={1: 0.2, 3: 0.3},
)


def scene_of_rank_8() -> Scene:
    scene = make_scene(1)
    return replace(scene, profile=replace(scene.profile, rank=8))


def ways_of(scene: Scene) -> tuple[Way, ...]:
    batch = scene.work.batch_size
    costs = CutCosts.from_profile(scene.profile, batch, device_only=True)
    fresh = scene.work.fresh(scene.samples[0], 2, 1)
    return ways_to_train(costs, scene.profile, batch, TABLE, fresh)


def test_ways_are_what_the_table_has() -> None:
    ways = ways_of(scene_of_rank_8())
    assert [(way.rank, way.frozen) for way in ways] == [
        (None, False),
        (None, True),
        (2, False),
        (2, True),
    ]
    assert ways[3].loss_increase == pytest.approx([0.1, 0.3, 0.1, 0.4, *[0.1] * (N_BLOCKS - 3)])
    possible = ways[3].costs.possible
    assert possible is not None
    assert np.flatnonzero(possible).tolist() == [1, 3]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("cut", [1, 3])
def test_a_turn_costs_what_its_way_says(number: int, cut: int) -> None:
    scene = scene_of_rank_8()
    way = ways_of(scene)[number]
    turn = replace(scene.turn(0, Route.two_tier(N_BLOCKS, cut)), rank=way.rank, frozen=way.frozen)
    line = scene.timeline(check(RoundPlan.parallel([turn]), scene))
    costs, steps, fresh = way.costs, turn.steps, float(np.asarray(way.fresh))
    assert line.cost.device_memory_bytes[0] == pytest.approx(costs.memory_bytes[cut])
    up = steps * fresh * costs.uplink_bits[cut] + (not way.frozen) * costs.adapter_bits[cut]
    assert line.cost.uplink_bytes.sum() == pytest.approx(up / 8)
    down = steps * costs.downlink_bits[cut] + costs.adapter_bits[cut]
    assert line.cost.downlink_bytes.sum() == pytest.approx(down / 8)
    busy = [one for one in line.activities(detail=True) if one.kind == "compute"]
    device_s = sum(one.busy_s for one in busy if one.entity == "device 0")
    flops = steps * fresh * costs.device_flops[cut]
    assert device_s == pytest.approx(flops / scene.fleet.devices.flops[0])


def test_the_whole_of_it_costs_what_it_did() -> None:
    scene = scene_of_rank_8()
    costs = CutCosts.from_profile(scene.profile, scene.work.batch_size, device_only=True)
    first = ways_of(scene)[0].costs
    for name in ("device_flops", "uplink_bits", "downlink_bits", "adapter_bits", "memory_bytes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(costs, name))
