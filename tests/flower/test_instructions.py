"""What a Flower strategy tells its clients is obeyed on every tier, or refused by name."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from fedsplit.strategies.fedlora import FedLora
from fedsplit.strategies.splitfed import SplitFed
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedProx,
    Strategy,
)
from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.execution import OptimizerSpec
from fedsplit.execution.tier import Tier
from fedsplit.models import load
from fedsplit.plan import DEVICE, Route, Segment
from fedsplit.schemes import Scheme
from fedsplit.testing.federation import Federation
from tests.flower.test_strategy import initial

EVERYBODY = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}


def trained(federation: Federation, scheme: Scheme, inner: Strategy) -> dict[str, Tensor]:
    return federation.run(scheme, inner, steps=3)[0]


def distance(found: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    return float(sum((found[name] - start[name]).square().sum() for name in start) ** 0.5)


def test_fedprox_without_a_weight_is_fedavg(federation: Federation) -> None:
    plain = trained(federation, SplitFed(cut=2), FedAvg(**EVERYBODY))
    found = trained(federation, SplitFed(cut=2), FedProx(proximal_mu=0.0, **EVERYBODY))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_fedprox_holds_the_model_back_the_same_at_every_cut(federation: Federation) -> None:
    start = initial(federation)
    plain = trained(federation, FedLora(), FedAvg(**EVERYBODY))
    whole = trained(federation, FedLora(), FedProx(proximal_mu=1000.0, **EVERYBODY))
    assert distance(whole, start) < 0.9 * distance(plain, start)
    for scheme in (SplitFed(cut=1), SplitFed(cut=3), SplitFed(cut=1, tail=1)):
        found = trained(federation, scheme, FedProx(proximal_mu=1000.0, **EVERYBODY))
        for name, tensor in whole.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_the_term_is_the_gradient_of_its_definition(federation: Federation) -> None:
    """One step of SGD: ``w1 = w0 - lr g0``; the second adds ``mu (w1 - w0)`` to its gradient."""
    model = load(federation.job.model)
    segment = Segment(DEVICE, 0, model.n_blocks)
    start, mu, lr = model.adapters(segment), 0.5, 0.1
    ids = torch.arange(8).view(1, 8)
    inputs = {"input_ids": ids, "labels": ids}

    def two_steps(weight: float, optimizer: str = "sgd") -> dict[str, Tensor]:
        spec = OptimizerSpec(name=optimizer, lr=lr, proximal_mu=weight)
        tier = Tier(model, [segment], start, spec, seed=0)
        for _ in range(2):
            tier.train_on(segment, inputs)
            tier.update()
        return tier.adapters()

    first = Tier(model, [segment], start, OptimizerSpec(name="sgd", lr=lr), seed=0)
    first.train_on(segment, inputs)
    first.update()
    after_one = first.adapters()
    plain, found = two_steps(0.0), two_steps(mu)
    for name, tensor in found.items():
        expected = plain[name] - lr * mu * (after_one[name] - start[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)
    assert Route.device_only(model.n_blocks).segments[0] == segment


class Records(FedAvg):
    """Keeps the complete replies that it is to aggregate."""

    replies: list[Message]

    def aggregate_train(  # type: ignore[override]
        self, server_round: int, replies: Iterable[Message]
    ) -> object:
        self.replies = list(replies)
        return super().aggregate_train(server_round, self.replies)


def test_client_side_clipping_is_that_of_the_whole_adapter_set(federation: Federation) -> None:
    norm, start = 1e-3, initial(federation)
    plain, inner = Records(**EVERYBODY), Records(**EVERYBODY)
    federation.run(SplitFed(cut=2), plain)
    private = DifferentialPrivacyClientSideFixedClipping(
        inner, noise_multiplier=0.0, clipping_norm=norm, num_sampled_clients=4
    )
    federation.run(SplitFed(cut=2), private)
    for free, bound in zip(plain.replies, inner.replies, strict=True):
        whole, clipped = (
            {name: array.numpy() for name, array in reply.content["arrays"].items()}
            for reply in (free, bound)
        )
        before = {name: tensor.numpy() for name, tensor in start.items()}
        length = np.sqrt(sum(((whole[name] - before[name]) ** 2).sum() for name in before))
        assert length > norm
        for name, value in before.items():
            expected = value + (whole[name] - value) * (norm / length)
            np.testing.assert_allclose(clipped[name], expected, rtol=0, atol=1e-7)


class Asks(FedAvg):
    """Tells its clients what none of them obeys."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        config["local-epochs"] = 3
        return super().configure_train(server_round, arrays, config, grid)


def test_what_nobody_obeys_is_refused_before_the_round(federation: Federation) -> None:
    trainings: list[int] = []

    def count(message: Message, device: int) -> None:
        if message.metadata.message_type.startswith("train"):
            trainings.append(device)

    with pytest.raises(FedsplitError, match="aggregator tells devices local-epochs=3: must be"):
        federation.run(SplitFed(cut=2), Asks(**EVERYBODY), disturb=count)
    assert not trainings


def test_server_side_noise_is_added_to_the_mean_of_clipped_updates(federation: Federation) -> None:
    norm, start = 1e-3, initial(federation)
    bare = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(**EVERYBODY), noise_multiplier=0.0, clipping_norm=norm, num_sampled_clients=4
    )
    clipped = trained(federation, SplitFed(cut=2), bare)
    assert 0 < distance(clipped, start) <= norm * (1 + 1e-5)
    noisy = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(**EVERYBODY), noise_multiplier=2.0, clipping_norm=norm, num_sampled_clients=4
    )
    found = trained(federation, SplitFed(cut=2), noisy)
    count = sum(tensor.numel() for tensor in start.values())
    deviation = distance(found, clipped) / count**0.5
    assert deviation == pytest.approx(2.0 * norm / 4, rel=0.1)
