"""CPSL: one cluster in a round, its devices in parallel, starting from the cluster before."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from fedsplit.strategies.cpsl import Cpsl
from fedsplit.strategies.splitfed import SplitFed
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum, Strategy
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.fleet import ServingSpec
from fedsplit.flower.node.device import named_data
from fedsplit.plan import RoundPlan, Route
from fedsplit.schemes import Scene
from tests.flower.conftest import N_DEVICES, Federation
from tests.flower.test_strategy import assert_equal, initial, train_unsplit
from tests.strategies.scenes import N_BLOCKS, cost, make_scene, scenes


def test_one_cluster_trains_as_splitfed(federation: Federation, fedavg: Strategy) -> None:
    cluster, _ = federation.run(Cpsl(clusters=1, cut=2), fedavg)
    splitfed, _ = federation.run(SplitFed(cut=2), fedavg)
    assert_equal(cluster, splitfed, tolerance=0)


def test_a_cluster_goes_on_from_the_average_of_the_one_before(
    federation: Federation, fedavg: Strategy
) -> None:
    found, outcomes = federation.run(Cpsl(clusters=2), fedavg, rounds=2)
    adapters = initial(federation)
    trained: list[int] = []
    for outcome in outcomes[1:]:
        members = [turn.turn.device for turn in outcome.turns]
        sets = [
            train_unsplit(federation, device, adapters, 2, outcome.server_round)
            for device in members
        ]
        sizes = [len(named_data(federation.job).train(device)) for device in members]
        adapters = {
            name: sum(n * each[name] for n, each in zip(sizes, sets, strict=True)) / sum(sizes)
            for name in adapters
        }
        trained += members
    assert_equal(found, adapters)
    assert sorted(trained) == list(range(N_DEVICES))


def test_the_device_side_is_trained_too(federation: Federation, fedavg: Strategy) -> None:
    found, _ = federation.run(Cpsl(clusters=2, cut=2), fedavg)
    start = initial(federation)
    on_device = [name for name in start if ".layers.0." in name or ".layers.1." in name]
    assert on_device
    assert any(not found[name].equal(start[name]) for name in on_device)


@pytest.mark.parametrize("kind", [FedAdam, FedMedian, Krum])
def test_any_flower_strategy_averages_a_cluster(federation: Federation, kind: type[FedAvg]) -> None:
    def inner() -> Strategy:
        return kind(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)

    cluster, _ = federation.run(Cpsl(clusters=1), inner())
    splitfed, _ = federation.run(SplitFed(), inner())
    assert_equal(cluster, splitfed, tolerance=0)


@settings(max_examples=40, deadline=None)
@given(
    scene=scenes(),
    clusters=st.integers(1, 9),
    rule=st.sampled_from(["similar", "random"]),
)
def test_a_round_is_one_cluster_of_those_present(scene: Scene, clusters: int, rule: str) -> None:
    clusters = min(clusters, scene.fleet.n_devices)
    plan = Cpsl(clusters, clustering=rule).plan_round(scene)
    size, formed = len(scene.devices), min(clusters, len(scene.devices))
    assert set(plan.devices) <= set(scene.devices)
    assert len(plan.branches) in (size // formed, -(-size // formed))
    cost(plan, scene)


@settings(max_examples=25, deadline=None)
@given(
    devices=st.integers(1, 12),
    clusters=st.integers(1, 12),
    pass_=st.integers(0, 2),
    rule=st.sampled_from(["similar", "random"]),
)
def test_a_pass_visits_everybody_once(devices: int, clusters: int, pass_: int, rule: str) -> None:
    clusters = min(clusters, devices)
    scheme = Cpsl(clusters, clustering=rule)
    rounds = range(1 + pass_ * clusters, 1 + (pass_ + 1) * clusters)
    plans = [scheme.plan_round(make_scene(devices, server_round=round_)) for round_ in rounds]
    assert sorted(device for plan in plans for device in plan.devices) == list(range(devices))


@pytest.mark.parametrize("seed", range(4))
def test_no_other_clusters_make_a_pass_shorter(seed: int) -> None:
    """All ways to put six devices in three clusters, or two, on the mean channel."""
    scene = make_scene(6, seed=seed)
    fleet = replace(scene.fleet, serving=ServingSpec("partition"))
    scene = replace(scene, fleet=fleet, channel=scene.mean_channel(1))
    for clusters in (2, 3):

        def pass_s(order: Sequence[int], clusters: int = clusters) -> float:
            route = Route.two_tier(N_BLOCKS, 2)
            parts = np.array_split(order, clusters)
            plans = [
                RoundPlan.parallel(scene.turn(int(device), route) for device in part)
                for part in parts
            ]
            return sum(cost(plan, scene).delay_s for plan in plans)

        rounds = [replace(scene, server_round=1 + number) for number in range(clusters)]
        mine = [Cpsl(clusters).plan_round(each).devices for each in rounds]
        found = pass_s([device for cluster in mine for device in cluster])
        every = {
            tuple(np.concatenate([np.sort(part) for part in np.array_split(order, clusters)]))
            for order in permutations(range(6))
        }
        assert found == pytest.approx(min(map(pass_s, every)), rel=1e-9)
        assert len(every) > 9


def test_clusters_hold_for_the_run_or_are_drawn_anew_for_every_pass() -> None:
    def members(rule: str, pass_: int) -> list[tuple[int, ...]]:
        rounds = [make_scene(9, server_round=3 * pass_ + number) for number in (1, 2, 3)]
        return [Cpsl(3, clustering=rule).plan_round(scene).devices for scene in rounds]

    assert members("similar", 0) == members("similar", 5)
    assert members("random", 0) != members("random", 1)


def test_more_clusters_than_devices_are_refused() -> None:
    with pytest.raises(FedsplitError, match=r"strategy\.clusters=7: must be 1 to 6"):
        Cpsl(clusters=7).plan_round(make_scene(6))
    with pytest.raises(FedsplitError, match=r"strategy\.clustering='near'"):
        Cpsl(clustering="near")
