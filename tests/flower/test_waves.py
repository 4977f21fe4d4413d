"""Turns side by side in a branch: averaged where they trained, and the same in sum."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from flwr.serverapp.strategy import FedAdam, FedAvg, Krum, Strategy

from fedsplit.errors import FedsplitError
from fedsplit.execution import weighted_mean
from fedsplit.flower import RoundOutcome
from fedsplit.flower.messages import EDGE as EDGE_MESSAGE
from fedsplit.flower.messages import read_task
from fedsplit.flower.node import edge as edge_node
from fedsplit.flower.node.device import named_data
from fedsplit.flower.tasks import EdgeTask, Verdict
from fedsplit.plan import DEVICE, EDGE, Branch, RoundPlan, Route
from fedsplit.schemes import Scene, Scheme
from tests.flower.conftest import N_DEVICES, Federation
from tests.flower.test_strategy import Adapters, assert_equal, initial, slow_down, train_unsplit

EVERYBODY = [[0, 1, 2, 3]]
TWO_EDGES = [[0, 2], [1, 3]]
ROUTES = {
    "three tiers": lambda n: Route.three_tier(n, 1, 2),
    "empty cloud": lambda n: Route.through(n, (1,), (DEVICE, EDGE)),
    "U shape": lambda n: Route.parse(
        f"device[0:1] -> edge[1:2] -> cloud[2:{n - 1}] -> device[{n - 1}:{n}]", n
    ),
    "two tiers": lambda n: Route.two_tier(n, 1),
    "device only": Route.device_only,
}


class EdgeRounds(Scheme):
    """The devices of each group train side by side, `times` in a round."""

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        times: int,
        route: Callable[[int], Route] = ROUTES["three tiers"],
    ) -> None:
        self.groups, self.times, self.route = groups, times, route

    def plan_round(self, scene: Scene) -> RoundPlan:
        route = self.route(scene.n_blocks)
        groups = [
            [replace(scene.turn(device, route), edge=k % 2) for device in group]
            for k, group in enumerate(self.groups)
        ]
        return RoundPlan.hierarchical(groups, self.times)


class Flat(EdgeRounds):
    """The same devices, each in a branch of its own."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        plan = super().plan_round(scene)
        return RoundPlan.parallel(turn for branch in plan.branches for turn in branch.turns)


def mean(federation: Federation, sets: dict[int, Adapters]) -> Adapters:
    """Return the mean over devices, weighted by their samples, in double precision."""
    sizes = {device: len(named_data(federation.job).train(device)) for device in sets}
    shares = {device: size / sum(sizes.values()) for device, size in sizes.items()}
    return {
        name: torch.stack([share * sets[d][name].double() for d, share in shares.items()])
        .sum(0)
        .float()
        for name in initial(federation)
    }


def edge_rounds(
    federation: Federation, waves: Sequence[Sequence[int]], start: Adapters | None = None
) -> Adapters:
    """Train the unsplit model in rounds of federated averaging: the oracle."""
    adapters = start if start is not None else initial(federation)
    for repeat, wave in enumerate(waves):
        trained = {
            device: train_unsplit(federation, device, adapters, 2, repeat=repeat) for device in wave
        }
        adapters = mean(federation, trained)
    return adapters


@pytest.mark.parametrize("route", ROUTES)
def test_one_edge_round_equals_averaging_the_same_devices_flat(
    federation: Federation, fedavg: Strategy, route: str
) -> None:
    """Weights are preserved: edges first and then the cloud is the flat weighted mean."""
    flat, _ = federation.run(Flat(TWO_EDGES, 1, ROUTES[route]), fedavg)
    found, outcomes = federation.run(EdgeRounds(TWO_EDGES, 1, ROUTES[route]), fedavg)
    assert_equal(found, flat, tolerance=2e-7)
    assert [turn.turn.device for turn in outcomes[1].turns] == [0, 2, 1, 3]
    sizes = [len(named_data(federation.job).train(device)) for device in range(N_DEVICES)]
    assert len(set(sizes)) > 1, "equal weights would show nothing"


@pytest.mark.parametrize("route", ["three tiers", "two tiers"])
def test_two_edge_rounds_equal_two_rounds_of_federated_averaging(
    federation: Federation, fedavg: Strategy, route: str
) -> None:
    found, outcomes = federation.run(EdgeRounds(EVERYBODY, 2, ROUTES[route]), fedavg)
    assert_equal(found, edge_rounds(federation, EVERYBODY * 2), tolerance=1e-6)
    assert [(turn.turn.device, turn.turn.repeat) for turn in outcomes[1].turns] == [
        (device, repeat) for repeat in range(2) for device in range(N_DEVICES)
    ]
    assert outcomes[1].turns[0].loss_sum != outcomes[1].turns[4].loss_sum


def test_two_edges_average_each_its_own_before_the_cloud_does(
    federation: Federation, fedavg: Strategy
) -> None:
    found, _ = federation.run(EdgeRounds(TWO_EDGES, 2), fedavg)
    edges = [edge_rounds(federation, [group] * 2) for group in TWO_EDGES]
    sizes = [sum(len(named_data(federation.job).train(d)) for d in group) for group in TWO_EDGES]
    expected = {
        name: sum(size * each[name] for size, each in zip(sizes, edges, strict=True)) / sum(sizes)
        for name in found
    }
    assert_equal(found, expected)  # type: ignore[arg-type]


def test_a_single_device_may_train_several_times(federation: Federation, fedavg: Strategy) -> None:
    found, _ = federation.run(EdgeRounds([[1]], 3), fedavg)
    assert_equal(found, edge_rounds(federation, [[1]] * 3), tolerance=0)


@pytest.mark.parametrize("route", ["three tiers", "empty cloud", "U shape"])
def test_edges_as_nodes_average_as_edges_in_the_server(
    federation: Federation, fedavg: Strategy, tmp_path: Path, route: str
) -> None:
    scheme = EdgeRounds(TWO_EDGES, 2, ROUTES[route])
    hosted, expected = federation.run(scheme, fedavg, rounds=2)
    remote, outcomes = federation.run(scheme, fedavg, rounds=2, edge_folder=tmp_path)
    assert_equal(remote, hosted, tolerance=0)
    for found, wanted in zip(outcomes[1:], expected[1:], strict=True):
        assert not found.failures
        for turn, other in zip(found.turns, wanted.turns, strict=True):
            assert (turn.turn, turn.loss_sum) == (other.turn, other.loss_sum)
            assert turn.link_bytes == other.link_bytes


class DifferentCuts(EdgeRounds):
    """The devices of a wave are cut at different places."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        plan = super().plan_round(scene)
        (branch,) = plan.branches
        turns = tuple(
            replace(turn, route=Route.three_tier(scene.n_blocks, 1 + turn.device % 2, 3))
            for turn in branch.turns
        )
        return RoundPlan((Branch(turns, branch.width),))


def test_cuts_may_differ_within_a_wave_without_changing_the_result(
    federation: Federation, fedavg: Strategy, tmp_path: Path
) -> None:
    equal, _ = federation.run(EdgeRounds(EVERYBODY, 2), fedavg)
    hosted, _ = federation.run(DifferentCuts(EVERYBODY, 2), fedavg)
    remote, _ = federation.run(DifferentCuts(EVERYBODY, 2), fedavg, edge_folder=tmp_path)
    assert_equal(hosted, equal, tolerance=0)
    assert_equal(remote, equal, tolerance=0)


def test_an_edge_gets_one_message_and_gives_one_answer_in_a_round(
    federation: Federation, fedavg: Strategy, tmp_path: Path
) -> None:
    asked: list[int] = []

    def disturb(message: Message, node: int) -> None:
        if node >= N_DEVICES and message.metadata.message_type == EDGE_MESSAGE:
            asked.extend([node] if read_task(message, EdgeTask).train else [])

    federation.run(EdgeRounds(TWO_EDGES, 3), fedavg, disturb=disturb, edge_folder=tmp_path)
    assert sorted(asked) == [N_DEVICES, N_DEVICES + 1]


@pytest.mark.parametrize("at", [1, 2])
def test_an_edge_goes_on_without_a_device_that_is_lost(
    federation: Federation, fedavg: Strategy, tmp_path: Path, at: int
) -> None:
    scheme = EdgeRounds(EVERYBODY, 3)
    hosted, _ = federation.run(scheme, fedavg, disturb=lose(1, at))
    remote, outcomes = federation.run(scheme, fedavg, disturb=lose(1, at), edge_folder=tmp_path)
    assert_equal(remote, hosted, tolerance=0)
    assert [failure.who for failure in outcomes[1].failures] == ["device 1"]
    assert len(outcomes[1].turns) == 11


def test_a_wave_that_nobody_finishes_changes_nothing_at_an_edge(
    federation: Federation, fedavg: Strategy, tmp_path: Path
) -> None:
    scheme = EdgeRounds([[1], [0, 2]], 2)
    hosted, _ = federation.run(scheme, fedavg, disturb=lose(1, 2))
    remote, _ = federation.run(scheme, fedavg, disturb=lose(1, 2), edge_folder=tmp_path)
    assert_equal(remote, hosted, tolerance=0)


@pytest.mark.parametrize("when", ["before", "between waves"])
def test_an_edge_that_fails_loses_what_its_branch_trained(
    federation: Federation,
    fedavg: Strategy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """Nobody else has the adapters of its devices; the other edge's stand."""

    def disturb(message: Message, node: int) -> None:
        is_task = message.metadata.message_type == EDGE_MESSAGE
        if when == "before" and node == N_DEVICES + 1 and is_task:
            raise RuntimeError("power cut")

    def mean(sets: Sequence[Adapters], weights: Sequence[float]) -> Adapters:
        if when == "between waves" and list(weights) == at_edge_1:
            raise RuntimeError("power cut")
        return weighted_mean(sets, weights)

    at_edge_1 = [float(len(named_data(federation.job).train(device))) for device in TWO_EDGES[1]]
    monkeypatch.setattr(edge_node, "weighted_mean", mean)
    found, outcomes = federation.run(
        EdgeRounds(TWO_EDGES, 2), fedavg, disturb=disturb, edge_folder=tmp_path
    )
    assert_equal(found, edge_rounds(federation, [TWO_EDGES[0]] * 2))
    assert [branch.survived for branch in outcomes[1].branches] == [True, False]
    failures = [one for one in outcomes[1].failures if one.phase == "train"]
    assert {one.who for one in failures} == {"edge 1", "device 1", "device 3"}
    assert len(failures) == 3
    assert "power cut" in next(one.reason for one in failures if one.role == EDGE)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"branch": 0, "wave": 0, "counted": 3},
        {"branch": 0, "wave": -1, "counted": []},
        {"branch": 0, "wave": 0, "counted": [True]},
        {"branch": "0", "wave": 0, "counted": []},
    ],
)
def test_an_edge_refuses_words_that_are_no_verdict(words: dict[str, object]) -> None:
    with pytest.raises(FedsplitError, match="words="):
        Verdict.read(words)


def test_adapters_stay_off_the_messages_and_are_counted_apart(
    federation: Federation, fedavg: Strategy
) -> None:
    flat = federation.run(Flat(TWO_EDGES, 1), fedavg)[1][1].turns
    joint = federation.run(EdgeRounds(TWO_EDGES, 1), fedavg)[1][1].turns
    by_device = {turn.turn.device: turn.link_bytes for turn in flat}
    for turn in joint:
        given, fetched = by_device[turn.turn.device], dict(turn.link_bytes)
        assert min(fetched.pop("adapters-up"), fetched.pop("adapters-down")) > 1000
        assert fetched.keys() == given.keys()
        assert all(abs(fetched[name] - given[name]) <= 16 for name in given)


def lose(device: int, at: int) -> Callable[[Message, int], None]:
    """Let `device` fail when it is asked to train for the `at`-th time."""
    asked = 0

    def disturb(message: Message, node: int) -> None:
        nonlocal asked
        if node == device and message.metadata.message_type == "train.device":
            asked += 1
            if asked == at:
                raise RuntimeError("battery empty")

    return disturb


@pytest.mark.parametrize(
    ("at", "waves"), [(1, [[0, 2, 3], [0, 1, 2, 3]]), (2, [[0, 1, 2, 3], [0, 2, 3]])]
)
def test_a_device_lost_in_one_wave_leaves_the_others_exact(
    federation: Federation, fedavg: Strategy, at: int, waves: list[list[int]]
) -> None:
    found, outcomes = federation.run(EdgeRounds(EVERYBODY, 2), fedavg, disturb=lose(1, at))
    assert_equal(found, edge_rounds(federation, waves))
    assert [failure.index for failure in outcomes[1].failures] == [1]
    assert len(outcomes[1].turns) == 7


def test_a_wave_nobody_finishes_leaves_the_adapters_of_the_one_before(
    federation: Federation, fedavg: Strategy
) -> None:
    found, outcomes = federation.run(EdgeRounds([[1], [0, 2]], 2), fedavg, disturb=lose(1, 2))
    assert [failure.index for failure in outcomes[1].failures] == [1]
    left = {1: edge_rounds(federation, [[1]])}
    both = edge_rounds(federation, [[0, 2]] * 2)
    sizes = [len(named_data(federation.job).train(device)) for device in range(3)]
    expected = {
        name: (sizes[1] * left[1][name] + (sizes[0] + sizes[2]) * both[name]) / sum(sizes)
        for name in both
    }
    assert_equal(found, expected)


def test_results_do_not_depend_on_concurrency_or_finishing_order(
    federation: Federation, fedavg: Strategy
) -> None:
    def run(concurrency: int, order: Sequence[int]) -> tuple[Adapters, list[RoundOutcome]]:
        return federation.run(
            EdgeRounds(TWO_EDGES, 2),
            fedavg,
            rounds=2,
            concurrency=concurrency,
            disturb=slow_down(order),
        )

    reference, outcomes = run(1, [0, 0, 0, 0])
    for concurrency, order in ((2, [3, 2, 1, 0]), (4, [0, 3, 1, 2])):
        found, others = run(concurrency, order)
        assert_equal(found, reference, tolerance=0)
        for one, other in zip(outcomes, others, strict=True):
            assert [t.loss_sum for t in one.turns] == [t.loss_sum for t in other.turns]


@pytest.mark.parametrize("kind", [FedAdam, Krum])
def test_any_flower_strategy_averages_the_edges(federation: Federation, kind: type[FedAvg]) -> None:
    """It sees one reply per edge: that of its users, averaged."""

    def inner() -> Strategy:
        return kind(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)

    split, outcomes = federation.run(EdgeRounds(TWO_EDGES, 2), inner())
    whole, _ = federation.run(EdgeRounds(TWO_EDGES, 2, ROUTES["device only"]), inner())
    assert_equal(split, whole, tolerance=1e-6)
    assert len(outcomes[1].branches) == 2
    assert any(not torch.equal(split[name], value) for name, value in initial(federation).items())
