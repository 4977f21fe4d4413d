"""Fast takes each device's best cut of all, and trains what vanilla split learning trains."""

import numpy as np
import pytest
import torch
from fedsplit.apps.config import load_config
from fedsplit.apps.plan import Scenario, build_scenario
from fedsplit.strategies.fast import Fast
from fedsplit.strategies.vanilla import Vanilla
from flwr.serverapp.strategy import Strategy

from fedsplit.errors import FedsplitError
from fedsplit.fleet import RoundCost
from fedsplit.plan import RoundPlan, Route, Turn
from fedsplit.planning import CutCosts
from tests.flower.conftest import Federation


def cost_of(scenario: Scenario, turn: Turn, server_round: int) -> RoundCost:
    return scenario.system.timeline(RoundPlan.parallel([turn]), server_round).cost


def all_routes(n_blocks: int, min_blocks: int) -> list[Route]:
    cuts = [Route.two_tier(n_blocks, cut) for cut in range(min_blocks, n_blocks)]
    return [*cuts, Route.device_only(n_blocks)]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("strategy.min_blocks=0", "channel.bandwidth_hz=5e8"),
        ("strategy.min_blocks=3", "channel.bandwidth_hz=2e8", "codec=int8", "fleet.devices=6"),
        ("strategy.device_memory_bytes=6e7", "fleet.devices=8", "train.batch_size=4"),
        ("channel.bandwidth_hz=1e9", "fleet=heterogeneous", "fleet.devices=7"),
    ],
)
def test_every_device_gets_the_best_of_all_cuts(overrides: tuple[str, ...]) -> None:
    scenario = build_scenario(load_config(["strategy=fast", *overrides]))
    scheme = scenario.scheme
    assert isinstance(scheme, Fast)
    for server_round in (1, 2):
        (branch,) = scenario.plan_round(server_round).branches
        scene = scenario.system.scene(server_round, {turn.device: 1 for turn in branch.turns})
        for turn in branch.turns:
            routes = all_routes(scene.n_blocks, scheme.min_blocks)
            costs = [
                cost_of(scenario, scene.turn(turn.device, route), server_round) for route in routes
            ]
            memory = scheme.device_memory_bytes or scene.fleet.devices.memory_bytes[turn.device]
            best = min(
                cost.delay_s for cost in costs if cost.device_memory_bytes[turn.device] <= memory
            )
            mine = cost_of(scenario, turn, server_round)
            assert mine.delay_s == pytest.approx(best, rel=1e-9)
            assert mine.device_memory_bytes[turn.device] <= memory


def test_cuts_follow_the_channel() -> None:
    config = ["strategy=fast", "channel.bandwidth_hz=4e8", "fleet=heterogeneous"]
    scenario = build_scenario(load_config(config))
    routes = {
        str(turn.route)
        for server_round in range(1, 6)
        for turn in scenario.plan_round(server_round).branches[0].turns
    }
    assert len(routes) > 1


def memory_for(federation: Federation, cut: int) -> float:
    """Return device memory for `cut` blocks and no more."""
    costs = CutCosts.from_profile(federation.system.profile, federation.job.batch_size)
    return float(np.mean(costs.memory_bytes[cut : cut + 2]))


def assert_trains_as_vanilla(federation: Federation, fast: Fast, inner: Strategy) -> set[str]:
    """Return the routes that `fast` chose."""
    expected, _ = federation.run(Vanilla(cut=1), inner)
    found, outcomes = federation.run(fast, inner)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert not outcomes[1].failures
    return {str(turn.turn.route) for turn in outcomes[1].turns}


def test_a_device_that_gains_nothing_by_the_server_keeps_the_whole_model(
    federation: Federation, fedavg: Strategy
) -> None:
    routes = assert_trains_as_vanilla(federation, Fast(min_blocks=4), fedavg)
    assert routes == {"device[0:4]"}


def test_memory_makes_it_vanilla_split_learning(federation: Federation, fedavg: Strategy) -> None:
    fast = Fast(min_blocks=2, device_memory_bytes=memory_for(federation, 2))
    routes = assert_trains_as_vanilla(federation, fast, fedavg)
    assert routes == {"device[0:2] -> server[2:4]"}


def test_digits_are_classified_over_a_cut(digits: Federation, fedavg: Strategy) -> None:
    fast = Fast(device_memory_bytes=memory_for(digits, 1))
    routes = assert_trains_as_vanilla(digits, fast, fedavg)
    assert len(routes) == 1
    assert "device[0:1] -> server" in routes.pop()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"min_blocks": -1}, "strategy.min_blocks=-1"),
        ({"device_memory_bytes": float("nan")}, "strategy.device_memory_bytes=nan"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, float], named: str) -> None:
    with pytest.raises(FedsplitError, match=named):
        Fast(**settings)


def test_limits_that_no_cut_meets_say_what_is_missing() -> None:
    for override, named in (
        ("device_memory_bytes=1e3", "needs"),
        ("min_blocks=99", "has 6 blocks"),
    ):
        scenario = build_scenario(load_config(["strategy=fast", f"strategy.{override}"]))
        with pytest.raises(FedsplitError, match=named):
            scenario.plan_round(1)
