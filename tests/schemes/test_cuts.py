"""A cut rule takes another scheme's cuts, for the part of band and server that a device gets."""

from dataclasses import replace

import pytest
from fedsplit.apps.config import load_config
from fedsplit.apps.plan import build_scenario
from fedsplit.strategies.card import Card
from fedsplit.strategies.cpsl import Cpsl
from fedsplit.strategies.fast import Fast
from fedsplit.strategies.fedsllm import FedsLlm
from fedsplit.strategies.gsfl import Gsfl
from fedsplit.strategies.splitfed import SplitFed
from fedsplit.strategies.vanilla import Vanilla
from flwr.serverapp.strategy import Strategy

from fedsplit.errors import FedsplitError
from fedsplit.plan import RoundPlan, Route
from fedsplit.schemes import Cut, CutRule, Scene, Scheme, cuts
from fedsplit.wireless import downlink_bps, uplink_bps
from tests.flower.conftest import Federation
from tests.flower.test_strategy import assert_equal
from tests.strategies.scenes import N_BLOCKS, cost, make_scene


def wide_scene(devices: int) -> Scene:
    """Return a round on so much band that slow devices gain by the server, and fast ones do not."""
    scene = make_scene(devices)
    channel = scene.channel
    wide = replace(
        channel, uplink_hz=1000 * channel.uplink_hz, downlink_hz=1000 * channel.downlink_hz
    )
    return replace(scene, channel=wide)


def routes(plan: RoundPlan) -> dict[int, Route]:
    return {turn.device: turn.route for branch in plan.branches for turn in branch.turns}


def test_a_number_cuts_every_device_there() -> None:
    turns = CutRule(2, tail=1).turns(make_scene())
    assert {str(turn.route) for turn in turns} == {"device[0:2] -> server[2:5] -> device[5:6]"}


@pytest.mark.parametrize(
    ("cut", "planner"),
    [
        ("fast", Fast()),
        ("card", Card()),
        ({"name": "fast", "min_blocks": 4}, Fast(min_blocks=4)),
        ({"name": "card", "delay_weight": 0.9}, Card(delay_weight=0.9)),
    ],
)
def test_vanilla_with_a_rule_cuts_as_its_scheme(cut: Cut, planner: Scheme) -> None:
    scene = wide_scene(9)
    found = routes(Vanilla(cut=cut).plan_round(scene))
    assert found == routes(planner.plan_round(scene))
    assert len(set(found.values())) > 1


@pytest.mark.parametrize("scheme", [SplitFed, Vanilla, Gsfl, Cpsl, FedsLlm])
def test_every_scheme_with_a_free_cut_takes_a_rule(scheme: type[Scheme]) -> None:
    scene = make_scene(8)
    for cut in ("fast", "joint", "sft"):
        plan = scheme(cut=cut).plan_round(scene)
        assert set(plan.devices) <= set(scene.devices)
        assert cost(plan, scene).delay_s > 0


def test_a_rule_reckons_with_the_part_of_the_band_that_a_device_gets() -> None:
    """Fast's best cut for a sixth of band and server is what exhaustive search finds there."""
    scene = wide_scene(6)
    share = {
        "uplink_hz": scene.channel.uplink_hz / 6,
        "downlink_hz": scene.channel.downlink_hz / 6,
        "server_hz": scene.fleet.servers.clock_hz[0] / 6,
    }
    plan = SplitFed(cut="fast").plan_round(scene)
    assert routes(plan) != routes(Vanilla(cut="fast").plan_round(scene))
    for branch in plan.branches:
        (mine,) = branch.turns
        candidates = [Route.at_cut(N_BLOCKS, cut) for cut in range(1, N_BLOCKS + 1)]
        delays = {
            route: cost(
                RoundPlan.parallel([replace(scene.turn(mine.device, route), **share)]), scene
            ).delay_s
            for route in candidates
        }
        assert delays[mine.route] == pytest.approx(min(delays.values()), rel=1e-9)


def test_a_rule_trains_what_the_fixed_cut_trains(federation: Federation, fedavg: Strategy) -> None:
    fixed, _ = federation.run(Gsfl(groups=2, cut=1), fedavg)
    ruled, outcomes = federation.run(Gsfl(groups=2, cut="card"), fedavg)
    assert not outcomes[1].failures
    groups = [branch.branch.turns for branch in outcomes[1].branches]
    assert sorted(len(turns) for turns in groups) == [2, 2]
    assert_equal(fixed, ruled, tolerance=1e-6)


def test_the_command_line_names_a_rule_and_its_settings() -> None:
    scenario = build_scenario(
        load_config(["strategy=splitfed", "strategy.cut={name: fast, min_blocks: 3}"])
    )
    assert all(route.segments[0].stop >= 3 for route in routes(scenario.plan_round(1)).values())


@pytest.mark.parametrize(
    ("cut", "tail", "named"),
    [
        ("nobody", None, "strategy.cut='nobody': must be one of"),
        ({"name": "fast", "speed": 1}, None, "speed"),
        ({"min_blocks": 1}, None, "strategy.cut=''"),
        ("fast", 1, "strategy.tail=1"),
    ],
)
def test_wrong_rules_are_refused_when_the_scheme_is_made(
    cut: Cut, tail: int | None, named: str
) -> None:
    with pytest.raises(FedsplitError, match=named):
        SplitFed(cut=cut, tail=tail)


def test_a_scheme_that_does_not_cut_everybody_is_no_rule() -> None:
    with pytest.raises(FedsplitError, match=r"strategy\.cut=splitllm: .* device"):
        SplitFed(cut="splitllm").plan_round(make_scene(6, edges=2))


def test_a_part_of_the_band_has_the_same_rate_per_hertz() -> None:
    """A station spreads its power over its band, so a part of that has a part of the power."""
    scene = make_scene()
    part = cuts._part(scene, 4)
    devices = list(scene.devices)
    for rate, band in ((uplink_bps, "uplink_hz"), (downlink_bps, "downlink_hz")):
        whole_hz, part_hz = getattr(scene.channel, band), getattr(part.channel, band)
        assert part_hz == pytest.approx(whole_hz / 4)
        alone = rate(part.channel, part_hz, devices)
        shared = rate(scene.channel, whole_hz / 4, devices)
        assert alone == pytest.approx(shared)
    assert part.fleet.servers.flops == pytest.approx(scene.fleet.servers.flops / 4)
