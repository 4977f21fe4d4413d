"""What averaging leaves out becomes a change of the frozen weights, on every tier."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fedsplit.strategies.fedlora import FedLora
from fedsplit.strategies.splitfed import SplitFed
from flwr.app import Message
from flwr.serverapp.strategy import FedAdam, FedMedian, Strategy
from transformers import AutoModelForCausalLM

from fedsplit.data import training_batches
from fedsplit.errors import SettingsError
from fedsplit.execution import train_turn
from fedsplit.execution.aggregate import Part, aggregate
from fedsplit.flower import SplitOptions, SplitStrategy
from fedsplit.flower.messages import TRAIN
from fedsplit.flower.node import device as session
from fedsplit.flower.server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedsplit.growth import FEDEX, LEAVE_RESIDUALS, STACKING
from fedsplit.models import load
from fedsplit.models.ranks import (
    at_rank,
    factor_of,
    pair_of,
    put_back,
    residual_of,
    residual_rank,
    residuals,
    trained,
)
from fedsplit.plan import Branch, RoundPlan, Route
from fedsplit.schemes import Scene, Scheme
from fedsplit.schemes.turnout import CARRY, Waiting
from fedsplit.seeds import derive_seed, generator
from tests.flower.conftest import N_DEVICES, Federation
from tests.flower.test_ranks import RANKS, STEPS, Ranked, Waves
from tests.flower.test_strategy import Adapters, assert_equal, initial


def with_dense_delta(federation: Federation, adapters: Adapters, folder: Path) -> Path:
    """Save the base model with its residuals added as matrices: the oracle's frozen weights."""
    spec = federation.job.model
    base = AutoModelForCausalLM.from_pretrained(spec.source)
    state = base.state_dict()
    for name in adapters:
        other = pair_of(name)
        if other is not None and residual_of(name) in adapters:
            delta = adapters[residual_of(other)] @ adapters[residual_of(name)]
            weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            state[weight] += spec.alpha / spec.r * delta
    base.save_pretrained(folder)
    return folder


def train_unsplit(
    federation: Federation, server_round: int, device: int, adapters: Adapters, base: Path
) -> Adapters:
    """Train a whole model of the device's rank on other frozen weights, without any split."""
    job, rank = federation.job, RANKS.get(device, federation.job.model.r)
    alpha = job.model.alpha * rank / job.model.r
    model = load(replace(job.model, source=str(base), r=rank, alpha=alpha))
    rng = generator(job.seed, "batches", server_round, device)
    result = train_turn(
        model,
        Route.device_only(model.n_blocks),
        training_batches(session.named_data(job).train(device), job.batch_size, rng, STEPS),
        adapters=at_rank(adapters, rank),
        optimizer=job.optimizer,
        seed=derive_seed(job.seed, "turn", server_round, device),
    )
    return put_back(result.adapters, adapters)


def products(adapters: Adapters) -> Adapters:
    """What a set stands for, as matrices: residuals have many forms of one meaning."""
    found = {}
    for name, a in adapters.items():
        if (other := pair_of(name)) is not None:
            found[name] = adapters[other] @ a
            if (beside := residual_of(name)) in adapters:
                found[name] = found[name] + adapters[residual_of(other)] @ adapters[beside]
    return found


@pytest.mark.parametrize(
    ("scheme", "how"),
    [
        (SplitFed(cut=1), FEDEX),
        (SplitFed(cut=1, tail=1), STACKING),
        (FedLora(), FEDEX),
        (Waves(), FEDEX),
        (Waves(), STACKING),
    ],
    ids=["fedex", "u-stacking", "fedlora", "waves-fedex", "waves-stacking"],
)
def test_rounds_are_those_of_unsplit_models_with_the_delta_in_their_weights(
    federation: Federation, tmp_path: Path, scheme: Scheme, how: str
) -> None:
    found, outcomes = federation.run(Ranked(scheme), steps=STEPS, rounds=2, aggregation=how)
    data, adapters = session.named_data(federation.job), initial(federation)
    for server_round in (1, 2):
        base = with_dense_delta(federation, adapters, tmp_path / str(server_round))
        parts = [
            Part(
                adapters=train_unsplit(federation, server_round, device, trained(adapters), base)
                | residuals(adapters),
                weight=len(data.train(device)),
                rank=RANKS.get(device),
            )
            for device in range(N_DEVICES)
        ]
        adapters = aggregate(how, parts)
        assert outcomes[server_round].aggregation_error < 1e-6
    assert_equal(products(found), products(adapters), tolerance=2e-6)
    assert residual_rank(found) > 0


def test_a_device_is_sent_the_residuals_of_its_blocks_and_none_comes_back(
    federation: Federation,
) -> None:
    sent: list[set[str]] = []

    def look(message: Message, device: int) -> None:
        if message.metadata.message_type == TRAIN:
            sent.append(set(message.content.array_records["arrays"]))

    found, outcomes = federation.run(
        SplitFed(cut=1), rounds=2, disturb=look, aggregation=FEDEX, concurrency=1
    )
    first, later = sent[:N_DEVICES], sent[N_DEVICES:]
    assert not any(factor_of(name) for names in first for name in names)
    beside = {name for name in found if factor_of(name) and "layers.0." in name}
    assert beside
    for names in later:
        assert {name for name in names if factor_of(name)} == beside
    assert not outcomes[2].failures


def test_over_links_residuals_go_down_and_not_up(federation: Federation) -> None:
    start = federation.run(SplitFed(cut=1), aggregation=FEDEX)[0]
    with_, without = (
        federation.run(Waves(), adapters=begin, aggregation=FEDEX)[1][1].turns[0].link_bytes
        for begin in (start, trained(start))
    )
    extra = sum(tensor.nbytes for name, tensor in residuals(start).items() if "layers.0." in name)
    assert extra <= with_["adapters-down"] - without["adapters-down"] <= extra + 2000  # headers
    assert with_["adapters-up"] == without["adapters-up"]


def test_a_run_goes_on_from_its_checkpoint_with_their_residuals(
    federation: Federation, tmp_path: Path
) -> None:
    whole, _ = federation.run(SplitFed(cut=1), rounds=2, aggregation=FEDEX)
    half, _ = federation.run(SplitFed(cut=1), rounds=1, aggregation=FEDEX)
    save_checkpoint(tmp_path, Checkpoint(1, half, {}))
    saved = load_checkpoint(tmp_path).adapters
    again, _ = federation.run(
        SplitFed(cut=1), rounds=2, aggregation=FEDEX, adapters=saved, first_round=2
    )
    assert_equal(again, whole, tolerance=0)


@pytest.mark.parametrize("how", LEAVE_RESIDUALS)
@pytest.mark.parametrize("make", [FedAdam, FedMedian])
def test_strategies_that_remember_adapters_or_want_each_branch_are_refused(
    federation: Federation, make: Callable[[], Strategy], how: str
) -> None:
    with pytest.raises(SettingsError, match=rf"adapters='{how}': must be mean with "):
        SplitStrategy(
            SplitFed(1), make(), job=federation.job, options=SplitOptions(aggregation=how)
        )


@pytest.mark.parametrize("how", LEAVE_RESIDUALS)
@pytest.mark.parametrize(
    ("options", "model", "named"),
    [
        ({"n_edges": 2}, {}, r"aggregator.adapters=.*edge servers that are nodes"),
        ({}, {"lora": {"use_dora": True}}, r"aggregator.adapters=.*use_dora"),
        ({"waiting": Waiting(quorum_devices=2, late=CARRY)}, {}, r"late='carry': must be drop"),
    ],
)
def test_what_residuals_do_not_go_with_is_refused(
    federation: Federation, how: str, options: dict, model: dict, named: str
) -> None:
    job = replace(federation.job, model=replace(federation.job.model, **model))
    with pytest.raises(SettingsError, match=named):
        SplitStrategy(SplitFed(1), job=job, options=SplitOptions(aggregation=how, **options))


class Ring(Scheme):
    """Two branches: one of two waves of two devices, and one of two devices in turn."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        route = Route.two_tier(scene.n_blocks, 1)
        first, second, third, last = (scene.turn(device, route) for device in scene.devices)
        twice = [replace(turn, repeat=n) for n in range(2) for turn in (first, second)]
        return RoundPlan((Branch(tuple(twice), 2), Branch((third, last))))


@pytest.mark.parametrize("how", LEAVE_RESIDUALS)
@pytest.mark.parametrize("scheme", [SplitFed(cut=1), Ring()], ids=["branches", "waves"])
def test_modelled_rounds_count_what_is_sent_beside_the_adapters(
    federation: Federation, scheme: Scheme, how: str
) -> None:
    """To the byte in messages; on links, tensors have headers that nobody models."""
    sent: dict[int, int] = {}
    begin: Adapters | None = None

    def look(message: Message, device: int) -> None:
        if message.metadata.message_type == TRAIN:
            arrays = message.content.array_records.get("arrays", {})
            sent[device] = sum(array.numpy().nbytes for array in arrays.values())

    for server_round in (1, 2, 3):
        begin, outcomes = federation.run(
            Ranked(scheme),
            rounds=server_round,
            first_round=server_round,
            steps=1,
            disturb=look,
            aggregation=how,
            adapters=begin,
        )
        turnout = outcomes[-1].turnout
        assert turnout is not None
        modelled = [
            one.sent_bytes
            for one in turnout.line.activities(detail=True)
            if (one.kind, one.label) == ("downlink", "adapters")
        ]
        for turn, expected in zip(outcomes[-1].turns, modelled, strict=True):
            real = turn.link_bytes.get("adapters-down") or sent[turn.turn.device]
            headers = 2800 if "adapters-down" in turn.link_bytes else 0
            assert expected <= real <= expected + headers
        assert residual_rank(begin) == min(turnout.residual, 32) > 0  # 32: the model's width
