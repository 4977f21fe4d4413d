"""FedsLLM trains as long as its local accuracy asks for, and divides the uplink by its plan."""

import math

import pytest
import torch
from fedsplit.apps.config import load_config
from fedsplit.apps.plan import build_scenario
from fedsplit.strategies.fedsllm import FedsLlm
from fedsplit.strategies.splitfed import SplitFed
from flwr.serverapp.strategy import Strategy

from fedsplit.errors import FedsplitError
from fedsplit.plan import Turn
from tests.flower.conftest import Federation


def turns_of(*overrides: str) -> list[Turn]:
    scenario = build_scenario(load_config(["strategy=fedsllm", *overrides]))
    return [turn for branch in scenario.plan_round(1).branches for turn in branch.turns]


@pytest.mark.parametrize(
    ("learning", "accuracy", "steps"),
    [
        ({"iterations": 3.0, "rounds": 20.0}, 0.5, 3),
        ({"iterations": 3.0, "rounds": 20.0}, 0.25, 6),
        ({"iterations": 3.0, "rounds": 20.0}, 0.45, 4),
        ({"iterations": 0.1, "rounds": 20.0}, 0.9, 1),
        (None, 0.1, math.ceil(2 / (1.9 * 0.1) * math.log2(10))),
    ],
)
def test_local_accuracy_sets_the_steps_of_a_turn(
    learning: dict[str, float] | None, accuracy: float, steps: int
) -> None:
    scenario = build_scenario(load_config(["strategy=fedsllm"]))
    scene = scenario.system.scene(1, {0: 10, 2: 10})
    plan = FedsLlm(accuracy=accuracy, learning=learning).plan_round(scene)
    assert [turn.steps for branch in plan.branches for turn in branch.turns] == [steps, steps]


def test_a_given_accuracy_trains_as_splitfed_of_as_many_steps(
    federation: Federation, fedavg: Strategy
) -> None:
    learning = {"iterations": 1.5, "rounds": 20.0}
    expected, _ = federation.run(SplitFed(cut=1), fedavg, steps=3)
    found, outcomes = federation.run(
        FedsLlm(cut=1, accuracy=0.25, learning=learning), fedavg, steps=8
    )
    assert [turn.steps for turn in outcomes[1].turns] == [3] * 4
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("smashed_per", ["round", "iteration"])
@pytest.mark.parametrize("server_time", ["false", "true"])
def test_the_uplink_is_given_away_in_full_but_not_equally(
    smashed_per: str, server_time: str
) -> None:
    settings = (f"strategy.smashed_per={smashed_per}", f"strategy.server_time={server_time}")
    turns = turns_of("fleet.devices=6", *settings)
    shares = [turn.uplink_hz or 0.0 for turn in turns]
    assert sum(shares) == pytest.approx(20e6, rel=1e-6)
    assert max(shares) > 1.1 * min(shares)
    equal = turns_of("fleet.devices=6", "strategy.equal_bandwidth=true", *settings)
    assert [turn.uplink_hz for turn in equal] == [pytest.approx(20e6 / 6)] * 6


def test_dividing_the_uplink_shortens_a_round() -> None:
    delays = {}
    for equal in ("false", "true"):
        config = ["strategy=fedsllm", "strategy.accuracy=0.8", "strategy.smashed_per=iteration"]
        scenario = build_scenario(load_config([*config, f"strategy.equal_bandwidth={equal}"]))
        delays[equal] = scenario.timeline(1).cost.delay_s
    assert delays["false"] < 0.95 * delays["true"]


def test_planning_with_what_is_sent_shortens_the_training() -> None:
    """The paper's plan charges smashed data once a round, so that it trains too long in each."""
    totals = {}
    for smashed_per in ("round", "iteration"):
        config = ["strategy=fedsllm", f"strategy.smashed_per={smashed_per}"]
        scenario = build_scenario(load_config(config))
        scheme = scenario.scheme
        assert isinstance(scheme, FedsLlm)
        steps = scenario.plan_round(1).branches[0].turns[0].steps
        accuracy = 2 ** (-steps / scheme.learning.iterations)
        rounds = scheme.learning.global_rounds(accuracy)
        totals[smashed_per] = rounds * scenario.timeline(1).cost.delay_s
    assert totals["iteration"] < totals["round"]


def test_a_codec_makes_the_smashed_data_smaller() -> None:
    plain, small = (
        turns_of("strategy.smashed_per=iteration", f"codec={codec}")[0].steps
        for codec in ("identity", "int8")
    )
    assert small > plain


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"accuracy": 1.0}, "strategy.accuracy=1.0"),
        ({"accuracy": float("nan")}, "strategy.accuracy=nan"),
        ({"fed_share": 0.0}, "strategy.fed_share=0.0"),
        ({"smashed_per": "hour"}, "strategy.smashed_per='hour'"),
        ({"learning": {"iterations": 3.0}}, "strategy.learning=.*smoothness.* iterations, rounds"),
        ({"learning": {"iterations": -3.0, "rounds": 1.0}}, "iterations=-3.0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(FedsplitError, match=named):
        FedsLlm(**settings)  # type: ignore[arg-type]


def test_a_cut_beyond_the_model_is_named() -> None:
    with pytest.raises(FedsplitError, match="cut=7: must be between 0 and 6"):
        turns_of("strategy.cut=7")


def test_a_fitted_curve_can_be_configured() -> None:
    turns = turns_of("strategy.learning={iterations: 2, rounds: 9}", "strategy.accuracy=0.5")
    assert turns[0].steps == 2
