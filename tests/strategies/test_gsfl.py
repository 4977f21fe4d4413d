"""GSFL: between vanilla split learning and SplitFed, with groups that end together."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from fedsplit.strategies.gsfl import Gsfl, turn_times_s
from fedsplit.strategies.splitfed import SplitFed
from fedsplit.strategies.vanilla import Vanilla
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.fleet import ServingSpec, timeline
from fedsplit.flower.node.device import named_data
from fedsplit.schemes import Scene
from tests.flower.conftest import N_DEVICES, Federation
from tests.flower.test_strategy import assert_equal, initial, train_unsplit
from tests.strategies.scenes import cost, make_scene, scenes


def test_one_group_trains_as_vanilla_split_learning(
    federation: Federation, fedavg: Strategy
) -> None:
    one, outcomes = federation.run(Gsfl(groups=1), fedavg)
    vanilla, _ = federation.run(Vanilla(), fedavg)
    assert_equal(one, vanilla, tolerance=0)
    assert len(outcomes[1].branches) == 1


def test_a_group_for_every_device_trains_as_splitfed(
    federation: Federation, fedavg: Strategy
) -> None:
    groups, _ = federation.run(Gsfl(groups=N_DEVICES), fedavg)
    splitfed, _ = federation.run(SplitFed(), fedavg)
    # Branches may come in another order, and sums of floats depend on it.
    assert_equal(groups, splitfed, tolerance=1e-7)


@pytest.mark.parametrize("weights", ["samples", "equal"])
def test_what_the_last_device_of_each_group_leaves_is_averaged(
    federation: Federation, fedavg: Strategy, weights: str
) -> None:
    found, outcomes = federation.run(Gsfl(groups=2, weights=weights), fedavg)
    last, shares = [], []
    for branch in outcomes[1].branches:
        adapters = initial(federation)
        for turn in branch.branch.turns:
            adapters = train_unsplit(federation, turn.device, adapters, 2)
        last.append(adapters)
        members = [turn.device for turn in branch.branch.turns]
        held = sum(len(named_data(federation.job).train(device)) for device in members)
        shares.append(held if weights == "samples" else 1)
    expected = {
        name: sum(share * each[name] for share, each in zip(shares, last, strict=True))
        / sum(shares)
        for name in last[0]
    }
    assert_equal(found, expected)


@pytest.mark.parametrize("kind", [FedAdam, FedMedian, Krum])
def test_any_flower_strategy_averages_groups(federation: Federation, kind: type[FedAvg]) -> None:
    def inner() -> Strategy:
        return kind(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)

    groups, _ = federation.run(Gsfl(groups=1), inner())
    vanilla, _ = federation.run(Vanilla(), inner())
    assert_equal(groups, vanilla, tolerance=0)


def test_it_classifies_images(digits: Federation, fedavg: Strategy) -> None:
    _, outcomes = digits.run(Gsfl(groups=2, cut=1), fedavg, rounds=2, steps=3)
    assert [len(outcome.branches) for outcome in outcomes] == [0, 2, 2]
    assert not any(outcome.failures for outcome in outcomes)
    assert outcomes[2].evaluation[0].n_correct is not None


@settings(max_examples=40, deadline=None)
@given(scene=scenes(), groups=st.integers(1, 9), rule=st.sampled_from(["balanced", "random"]))
def test_everybody_present_trains_once_in_one_of_the_groups(
    scene: Scene, groups: int, rule: str
) -> None:
    groups = min(groups, scene.fleet.n_devices)
    plan = Gsfl(groups=groups, grouping=rule).plan_round(scene)
    assert sorted(plan.devices) == sorted(scene.devices)
    assert len(plan.branches) == min(groups, len(scene.devices))
    cost(plan, scene)


@settings(max_examples=25, deadline=None)
@given(scene=scenes(), groups=st.integers(1, 4))
def test_planned_turn_times_are_those_of_the_timeline(scene: Scene, groups: int) -> None:
    """On a server that is divided among the groups, as in the paper's delay model."""
    groups = min(groups, len(scene.devices))
    plan = Gsfl(groups=groups).plan_round(scene)
    fleet = replace(scene.fleet, serving=ServingSpec("partition"))
    line = timeline(plan, scene.profile, fleet, scene.channel, scene.work.batch_size)
    turns = [turn for branch in plan.branches for turn in branch.turns]
    taken = line.turn_end_s - line.turn_start_s
    np.testing.assert_allclose(turn_times_s(scene, turns, groups), taken, rtol=1e-9)


def round_s(scene: Scene) -> Callable[[str], float]:
    divided = replace(scene, fleet=replace(scene.fleet, serving=ServingSpec("partition")))
    return lambda rule: cost(Gsfl(3, grouping=rule).plan_round(divided), divided).delay_s


@pytest.mark.parametrize("seed", range(6))
def test_balanced_groups_end_nearly_with_the_best(seed: int) -> None:
    delay_s = round_s(make_scene(9, seed=seed))
    best, balanced = delay_s("exact"), delay_s("balanced")
    assert best * (1 - 1e-9) <= balanced <= (4 / 3 - 1 / 9) * best
    assert best <= delay_s("random") * (1 + 1e-9)


def test_random_groups_are_drawn_anew_in_every_round() -> None:
    scheme = Gsfl(groups=3, grouping="random")
    plans = [scheme.plan_round(make_scene(9, server_round=round_)) for round_ in (1, 2, 1)]
    assert plans[0] != plans[1]
    assert plans[0] == plans[2]


def test_more_groups_than_devices_are_refused() -> None:
    with pytest.raises(FedsplitError, match=r"strategy\.groups=7: must be 1 to 6"):
        Gsfl(groups=7).plan_round(make_scene(6))
    with pytest.raises(FedsplitError, match=r"strategy\.weights='some'.*samples, equal"):
        Gsfl(weights="some")
