"""Devices of several ranks: each trains the unsplit model of its rank, on every tier."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fedsplit.strategies.fedlora import FedLora
from fedsplit.strategies.splitfed import SplitFed
from fedsplit.strategies.vanilla import Vanilla
from flwr.app import Message
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    Krum,
    Strategy,
)

from fedsplit.data import training_batches
from fedsplit.errors import SettingsError
from fedsplit.execution import train_turn
from fedsplit.execution.aggregate import FFA, MEAN, PADDED, RAFLORA, Part, aggregate
from fedsplit.flower import SplitOptions, SplitStrategy
from fedsplit.flower.messages import TRAIN
from fedsplit.flower.node import device as session
from fedsplit.models import load
from fedsplit.models.ranks import at_rank, put_back
from fedsplit.plan import RoundPlan, Route
from fedsplit.schemes import Scene, Scheme
from fedsplit.schemes.turnout import Waiting
from fedsplit.seeds import derive_seed, generator
from tests.flower.conftest import N_DEVICES, Federation
from tests.flower.test_strategy import Adapters, assert_equal, initial

RANKS = {0: 1, 1: 2, 3: 1}
STEPS = 2


class Ranked(Scheme):
    """Another scheme's plan, in which devices have ranks of their own."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def plan_round(self, scene: Scene) -> RoundPlan:
        return self._scheme.plan_round(replace(scene, work=replace(scene.work, ranks=RANKS)))


class Waves(Scheme):
    """One branch, whose devices train side by side; adapters go over their links."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        route = Route.two_tier(scene.n_blocks, 1)
        turns = [scene.turn(device, route) for device in scene.devices]
        return RoundPlan.hierarchical([turns], rounds=1)


def train_unsplit(federation: Federation, device: int, adapters: Adapters) -> Adapters:
    """Train a model that was made at the device's rank, whole and without any split: the oracle."""
    job, rank = federation.job, RANKS.get(device, federation.job.model.r)
    spec = replace(job.model, r=rank, alpha=job.model.alpha * rank / job.model.r)
    model, samples = load(spec), session.named_data(job).train(device)
    rng = generator(job.seed, "batches", 1, device)
    result = train_turn(
        model,
        Route.device_only(model.n_blocks),
        training_batches(samples, job.batch_size, rng, STEPS),
        adapters=at_rank(adapters, rank),
        optimizer=job.optimizer,
        seed=derive_seed(job.seed, "turn", 1, device),
    )
    return put_back(result.adapters, adapters)


def oracle(federation: Federation, how: str) -> Adapters:
    start, data = initial(federation), session.named_data(federation.job)
    return aggregate(
        how,
        [
            Part(
                adapters=train_unsplit(federation, device, start),
                weight=len(data.train(device)),
                rank=RANKS.get(device),
            )
            for device in range(N_DEVICES)
        ],
    )


@pytest.mark.parametrize(
    ("scheme", "how"),
    [
        (SplitFed(cut=1), MEAN),
        (SplitFed(cut=1), RAFLORA),
        (SplitFed(cut=1, tail=1), PADDED),
        (FedLora(), RAFLORA),
        (Waves(), RAFLORA),
    ],
    ids=["mean", "raflora", "u-padded", "fedlora", "waves"],
)
def test_rounds_are_those_of_unsplit_models_of_each_rank(
    federation: Federation, scheme: Scheme, how: str
) -> None:
    found, outcomes = federation.run(Ranked(scheme), steps=STEPS, aggregation=how)
    assert_equal(found, oracle(federation, how))
    error = outcomes[1].aggregation_error
    assert error is not None
    assert error > 0
    assert all(turn.turn.rank is None for turn in outcomes[1].evaluation)


def test_a_branch_keeps_what_a_device_has_no_rank_for(federation: Federation) -> None:
    found, _ = federation.run(Ranked(Vanilla(cut=2)), steps=STEPS)
    adapters = initial(federation)
    for device in range(N_DEVICES):
        adapters = train_unsplit(federation, device, adapters)
    assert_equal(found, adapters, tolerance=1e-7)


@pytest.mark.parametrize("scheme", [SplitFed(cut=1), Waves()], ids=["branches", "waves"])
def test_what_a_device_is_sent_has_its_rank(federation: Federation, scheme: Scheme) -> None:
    sent: dict[int, int] = {}

    def look(message: Message, device: int) -> None:
        if message.metadata.message_type == TRAIN:
            arrays = message.content.array_records.get("arrays", {})
            sent[device] = sum(array.numpy().size for array in arrays.values())

    _, outcomes = federation.run(Ranked(scheme), steps=STEPS, disturb=look, aggregation=RAFLORA)
    if isinstance(scheme, Waves):
        down = "adapters-down"
        sent = {t.turn.device: t.link_bytes[down] for t in outcomes[1].turns}
        assert sent[0] < sent[1] == sent[2]
    else:
        assert 2 * sent[0] == 2 * sent[3] == sent[1] == sent[2] > 0


def test_with_a_frozen_a_the_aggregate_is_the_mean_of_what_devices_trained(
    federation: Federation,
) -> None:
    model = replace(federation.job.model, freeze_a=True)
    frozen = Federation(model, federation.job.data)
    found, outcomes = frozen.run(Ranked(SplitFed(cut=1)), steps=STEPS, rounds=2, aggregation=FFA)
    start = initial(frozen)
    assert all(torch.equal(found[name], start[name]) for name in start if "lora_A" in name)
    assert all(outcome.aggregation_error < 1e-6 for outcome in outcomes[1:])


ONLY_MEAN: list[Callable[[], Strategy]] = [
    FedMedian,
    Krum,
    lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 4),
]
NOT_ANEW: list[Callable[[], Strategy]] = [FedAdam, FedAvgM]


@pytest.mark.parametrize(
    ("make", "how"),
    [(make, how) for make in ONLY_MEAN for how in (PADDED, RAFLORA, FFA)]
    + [(make, RAFLORA) for make in NOT_ANEW],
)
def test_strategies_that_need_each_branch_or_remember_adapters_are_refused(
    federation: Federation, make: Callable[[], Strategy], how: str
) -> None:
    model = replace(federation.job.model, freeze_a=True)
    with pytest.raises(SettingsError, match=rf"adapters='{how}': must be mean with "):
        SplitStrategy(
            SplitFed(cut=1),
            make(),
            job=replace(federation.job, model=model),
            options=SplitOptions(aggregation=how),
        )


@pytest.mark.parametrize(
    ("make", "how"),
    [(FedAdam, PADDED), (FedMedian, MEAN), (lambda: FedProx(proximal_mu=0.1), RAFLORA)],
)
def test_others_work_with_devices_of_several_ranks(
    federation: Federation, make: Callable[..., Strategy], how: str
) -> None:
    _, outcomes = federation.run(Ranked(SplitFed(cut=1)), make(), aggregation=how)
    assert not outcomes[1].failures


def test_ffa_needs_a_frozen_a(federation: Federation) -> None:
    with pytest.raises(SettingsError, match=r"adapters='ffa': must be with model.freeze_a"):
        SplitStrategy(SplitFed(1), job=federation.job, options=SplitOptions(aggregation=FFA))


def test_a_round_ends_with_its_first_devices_the_same_every_time(federation: Federation) -> None:
    runs = [
        federation.run(SplitFed(cut=1), rounds=1, waiting=Waiting(quorum_devices=2))
        for _ in range(2)
    ]
    (found, first), (again, second) = runs
    late, again_late = (outcomes[1].turnout.late for outcomes in (first, second))
    assert late == again_late
    assert len(late) == N_DEVICES - 2
    trained = {turn.turn.device for turn in first[1].turns}
    assert trained == set(range(N_DEVICES)) - set(late)
    assert not first[1].failures
    assert_equal(found, again, tolerance=0)
