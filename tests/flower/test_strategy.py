"""A scheme's rounds compute what the unsplit model would, whoever finishes first."""

import random
import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from fedsplit.strategies.fedlora import FedLora
from fedsplit.strategies.splitfed import SplitFed
from fedsplit.strategies.vanilla import Vanilla
from flwr.app import Message
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum, Strategy
from torch import Tensor

from fedsplit.data import training_batches
from fedsplit.errors import FedsplitError
from fedsplit.execution import train_turn
from fedsplit.flower import RunEnds
from fedsplit.flower.node import device as session
from fedsplit.models import load
from fedsplit.patience import Patience
from fedsplit.plan import RoundPlan, Route
from fedsplit.schemes import Scene, Scheme
from fedsplit.seeds import derive_seed, generator
from tests.flower.conftest import N_DEVICES, Federation

Adapters = dict[str, Tensor]


def train_unsplit(
    federation: Federation,
    device: int,
    adapters: Adapters,
    steps: int,
    server_round: int = 1,
    repeat: int = 0,
) -> Adapters:
    """Train the whole model on one device's batches, without any split: the oracle."""
    job = federation.job
    model = load(job.model)
    samples = session.named_data(job).train(device)
    again = [repeat] if repeat else []
    rng = generator(job.seed, "batches", server_round, device, *again)
    result = train_turn(
        model,
        Route.device_only(model.n_blocks),
        training_batches(samples, job.batch_size, rng, steps),
        adapters=adapters,
        optimizer=job.optimizer,
        seed=derive_seed(job.seed, "turn", server_round, device, *again),
    )
    return result.adapters


def weighted_mean(federation: Federation, sets: Sequence[Adapters]) -> Adapters:
    data = session.named_data(federation.job)
    sizes = torch.tensor([float(len(data.train(device))) for device in range(N_DEVICES)])
    shares = (sizes / sizes.sum()).tolist()
    return {
        name: sum(share * each[name] for share, each in zip(shares, sets, strict=True))
        for name in sets[0]
    }


def initial(federation: Federation) -> Adapters:
    model = load(federation.job.model)
    return model.adapters(Route.device_only(model.n_blocks).segments[0])


def assert_equal(found: Adapters, expected: Adapters, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "scheme", [SplitFed(cut=1), SplitFed(cut=3), SplitFed(cut=1, tail=1), FedLora()]
)
def test_parallel_branches_equal_federated_averaging_of_the_unsplit_model(
    federation: Federation, fedavg: Strategy, scheme: Scheme
) -> None:
    scheme.inner = fedavg
    found, outcomes = federation.run(scheme, steps=3)
    start = initial(federation)
    trained = [train_unsplit(federation, device, start, 3) for device in range(N_DEVICES)]
    assert_equal(found, weighted_mean(federation, trained))
    assert outcomes[1].turns[0].steps == 3
    assert not outcomes[1].failures


def test_one_branch_equals_the_unsplit_model_handed_from_device_to_device(
    federation: Federation, fedavg: Strategy
) -> None:
    found, _ = federation.run(Vanilla(cut=2), fedavg, steps=2)
    adapters = initial(federation)
    for device in range(N_DEVICES):
        adapters = train_unsplit(federation, device, adapters, 2)
    assert_equal(found, adapters, tolerance=0)


class DifferentCuts(Scheme):
    """One branch whose devices are all cut at another place."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        routes = [
            Route.two_tier(scene.n_blocks, 1),
            Route.two_tier(scene.n_blocks, 3),
            Route.device_only(scene.n_blocks),
            Route.u_shaped(scene.n_blocks, 1, 3),
        ]
        return RoundPlan.sequential(scene.turn(d, routes[d]) for d in scene.devices)


class ThreeTiers(Scheme):
    """Every device behind an edge of its own."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        route = Route.three_tier(scene.n_blocks, 1, 2)
        return RoundPlan.parallel(scene.turn(device, route) for device in scene.devices)


def test_cuts_may_differ_from_device_to_device_without_changing_the_result(
    federation: Federation, fedavg: Strategy
) -> None:
    equal, _ = federation.run(Vanilla(cut=2), fedavg)
    different, _ = federation.run(DifferentCuts(), fedavg)
    assert_equal(different, equal, tolerance=0)


def test_three_tiers_equal_two(federation: Federation, fedavg: Strategy) -> None:
    two, _ = federation.run(SplitFed(cut=1), fedavg)
    three, outcomes = federation.run(ThreeTiers(), fedavg)
    assert_equal(three, two, tolerance=0)
    assert outcomes[1].turns[0].link_bytes["backhaul-up"] > 0


def slow_down(order: Sequence[int]) -> Callable[[Message, int], None]:
    def disturb(message: Message, device: int) -> None:
        if message.metadata.message_type.startswith("train"):
            time.sleep(0.15 * order[device])

    return disturb


@pytest.mark.parametrize("scheme", [SplitFed, Vanilla])
def test_results_do_not_depend_on_concurrency_or_finishing_order(
    federation: Federation, scheme: type[SplitFed]
) -> None:
    def losses(concurrency: int, order: Sequence[int]) -> list[object]:
        inner = FedAvg(
            fraction_train=0.5, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1
        )
        adapters, outcomes = federation.run(
            scheme(cut=1),
            inner,
            rounds=2,
            concurrency=concurrency,
            disturb=slow_down(order),
        )
        return [
            [(turn.turn.device, turn.loss_sum) for turn in [*outcome.turns, *outcome.evaluation]]
            for outcome in outcomes
        ] + [adapters["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].tolist()]

    reference = losses(1, [0, 0, 0, 0])
    assert losses(2, [3, 2, 1, 0]) == reference
    assert losses(4, [0, 3, 1, 2]) == reference


@pytest.mark.parametrize("kind", [FedAdam, FedMedian, Krum])
def test_any_flower_strategy_aggregates(federation: Federation, kind: type[FedAvg]) -> None:
    """The wrapped strategy sees what it would see of devices that train the whole model."""

    def inner() -> Strategy:
        return kind(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)

    split, _ = federation.run(SplitFed(cut=1), inner())
    whole, _ = federation.run(FedLora(), inner())
    assert_equal(split, whole, tolerance=0)


def test_only_members_of_the_round_are_averaged(federation: Federation) -> None:
    """Averaging counts each branch once, after its last step (a known defect elsewhere)."""
    inner = FedAvg(
        fraction_train=0.5, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1
    )
    found, outcomes = federation.run(SplitFed(cut=1), inner, steps=2)
    members = [turn.turn.device for turn in outcomes[1].turns]
    assert len(members) == 2
    start = initial(federation)
    sizes = [len(session.named_data(federation.job).train(device)) for device in members]
    trained = [train_unsplit(federation, device, start, 2) for device in members]
    expected = {
        name: sum(size * each[name] for size, each in zip(sizes, trained, strict=True)) / sum(sizes)
        for name in start
    }
    assert_equal(found, expected)


def test_evaluation_on_the_devices_can_be_switched_off(federation: Federation) -> None:
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    _, outcomes = federation.run(SplitFed(cut=1), inner, steps=1)
    assert [outcome.server_round for outcome in outcomes] == [1]
    assert outcomes[0].evaluation == ()


class ImpossibleLater(Scheme):
    """A good round, then one whose server is left without a block."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        cut = 1 if scene.server_round == 1 else scene.n_blocks
        route = Route.two_tier(scene.n_blocks, cut)
        return RoundPlan.parallel(scene.turn(device, route) for device in scene.devices)


def test_an_impossible_route_is_refused_before_anything_of_its_round_is_sent(
    federation: Federation, fedavg: Strategy
) -> None:
    trained: list[int] = []

    def count(message: Message, device: int) -> None:
        if message.metadata.message_type.startswith("train"):
            trained.append(device)

    with pytest.raises(FedsplitError, match=r"route=device\[0:4\] -> server\[4:4\]: .* at most 3"):
        federation.run(ImpossibleLater(), fedavg, rounds=2, disturb=count)
    assert sorted(trained) == list(range(N_DEVICES))


def test_a_failing_device_loses_its_turn_and_nothing_else(
    federation: Federation, fedavg: Strategy
) -> None:
    def disturb(message: Message, device: int) -> None:
        if device == 2 and message.metadata.message_type.startswith("train"):
            raise RuntimeError("battery empty")

    found, outcomes = federation.run(Vanilla(cut=2), fedavg, disturb=disturb)
    adapters = initial(federation)
    for device in (0, 1, 3):
        adapters = train_unsplit(federation, device, adapters, 2)
    assert_equal(found, adapters, tolerance=0)
    (failure,) = outcomes[1].failures
    assert (failure.who, failure.phase) == ("device 2", "train")
    assert "battery empty" in failure.reason


@pytest.mark.parametrize("watched", [False, True])
def test_a_silent_device_is_given_up_at_the_deadline(
    federation: Federation, fedavg: Strategy, watched: bool
) -> None:
    def disturb(message: Message, device: int) -> None:
        if device == 1 and message.metadata.message_type.startswith("train"):
            time.sleep(6)

    started = time.monotonic()
    _, outcomes = federation.run(
        SplitFed(cut=2),
        fedavg,
        disturb=disturb,
        patience=Patience(deadline_s=3),
        steps=1,
        watched=watched,
    )
    assert time.monotonic() - started < 30
    assert [failure.index for failure in outcomes[1].failures] == [1]
    assert {turn.turn.device for turn in outcomes[1].turns} == {0, 2, 3}


@pytest.mark.parametrize("watched", [False, True])
def test_devices_that_wait_for_a_place_are_not_late(
    federation: Federation, fedavg: Strategy, watched: bool
) -> None:
    def disturb(message: Message, device: int) -> None:
        if message.metadata.message_type.startswith("train"):
            time.sleep(1)

    started = time.monotonic()
    _, outcomes = federation.run(
        SplitFed(cut=2),
        fedavg,
        disturb=disturb,
        concurrency=1,
        places=1,
        patience=Patience(deadline_s=3),
        watched=watched,
    )
    assert time.monotonic() - started > 4, "the last one had to wait for longer than the deadline"
    assert not outcomes[1].failures


@pytest.mark.parametrize("watched", [False, True])
def test_a_place_that_never_gets_free_does_not_hang_the_run(
    federation: Federation, fedavg: Strategy, watched: bool
) -> None:
    over = threading.Event()

    def disturb(message: Message, device: int) -> None:
        if message.metadata.message_type.startswith("train"):
            over.wait(60)

    started = time.monotonic()
    with pytest.raises(FedsplitError, match="device 3: did not come within 1 s"):
        federation.run(
            SplitFed(cut=2),
            fedavg,
            disturb=disturb,
            concurrency=1,
            places=1,
            patience=Patience(deadline_s=1),
            watched=watched,
        )
    over.set()
    assert time.monotonic() - started < 20


def test_a_failure_is_reported_when_it_is_noticed_not_at_the_end_of_the_round(
    federation: Federation, fedavg: Strategy
) -> None:
    noticed: list[tuple[str, float]] = []
    struck: list[float] = []

    def disturb(message: Message, device: int) -> None:
        if message.metadata.message_type.startswith("train"):
            if device == 2:
                struck.append(time.time())
                raise RuntimeError("battery empty")
            time.sleep(3)

    _, outcomes = federation.run(
        SplitFed(cut=2),
        fedavg,
        disturb=disturb,
        on_failure=lambda failure: noticed.append((failure.who, time.time())),
    )
    ((who, when),) = noticed
    assert who == "device 2"
    assert when - struck[0] < 2
    assert [failure.unix_s for failure in outcomes[1].failures] == [pytest.approx(when, abs=0.5)]


def test_a_round_without_survivors_stops_the_run_and_says_why(
    federation: Federation, fedavg: Strategy
) -> None:
    def disturb(message: Message, device: int) -> None:
        if message.metadata.message_type.startswith("train"):
            raise RuntimeError(f"flood at {random.choice('xyz')}")

    with pytest.raises(ValueError, match=r"round 1: no device finished .*device 3: .*flood"):
        federation.run(SplitFed(cut=2), fedavg, disturb=disturb)


def test_a_run_that_is_to_end_before_a_round_keeps_what_the_rounds_before_made(
    federation: Federation,
) -> None:
    def ends(server_round: int, plan: RoundPlan) -> None:
        if server_round == 2:
            raise RunEnds("enough")

    whole, _ = federation.run(SplitFed(cut=2), rounds=1)
    found, outcomes = federation.run(SplitFed(cut=2), rounds=3, on_plan=ends)
    assert [outcome.server_round for outcome in outcomes] == [0, 1]
    assert all(torch.equal(found[name], whole[name]) for name in whole)
