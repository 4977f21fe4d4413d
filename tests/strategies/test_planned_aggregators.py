"""Planned schemes leave the wrapped Flower strategy as it is."""

from functools import cache

import pytest
import torch
from fedsplit.strategies.card import Card
from fedsplit.strategies.fast import Fast
from fedsplit.strategies.fedsllm import FedsLlm
from fedsplit.strategies.joint import Joint
from fedsplit.strategies.splitfed import SplitFed
from fedsplit.strategies.vanilla import Vanilla
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum, Strategy
from torch import Tensor

from fedsplit.schemes import Scheme
from tests.flower.conftest import Federation

TWO_STEPS = {"iterations": 2.0, "rounds": 20.0}


def inner_of(kind: type[FedAvg]) -> Strategy:
    return kind(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)


def scheme_of(name: str) -> Scheme:
    if name == "fedsllm":
        return FedsLlm(cut=1, accuracy=0.5, learning=TWO_STEPS)
    if name == "joint":
        return Joint(codec_table=None)
    return {"fast": Fast, "card": Card}[name]()


@cache
def baseline(
    federation: Federation, scheme: type[SplitFed], kind: type[FedAvg]
) -> dict[str, Tensor]:
    return federation.run(scheme(cut=1), inner_of(kind))[0]


@pytest.mark.parametrize("kind", [FedAdam, FedMedian, Krum])
@pytest.mark.parametrize(
    ("name", "same_as"),
    [("fast", Vanilla), ("card", Vanilla), ("fedsllm", SplitFed), ("joint", SplitFed)],
)
def test_any_flower_strategy_aggregates(
    federation: Federation, name: str, same_as: type[SplitFed], kind: type[FedAvg]
) -> None:
    found, outcomes = federation.run(scheme_of(name), inner_of(kind))
    expected = baseline(federation, same_as, kind)
    assert not outcomes[1].failures
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6)
