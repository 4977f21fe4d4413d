"""Optimizer settings are checked when they are made, and travel as plain values."""

from dataclasses import asdict

import pytest
import torch
from torch import nn

from fedsplit.errors import FedsplitError
from fedsplit.execution import OptimizerSpec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "lion"),
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("weight_decay", -0.1),
        ("momentum", float("nan")),
        ("eps", -1e-9),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
    ],
)
def test_bad_settings_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(FedsplitError, match=f"optimizer.{field}"):
        OptimizerSpec(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_optimizer_gets_the_settings(name: str) -> None:
    spec = OptimizerSpec(name, lr=0.5, weight_decay=0.25, momentum=0.75, betas=(0.5, 0.6), eps=1e-3)
    optimizer = spec.build([nn.Parameter(torch.ones(1))])
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__.lower() == name
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    expected = {"momentum": 0.75} if name == "sgd" else {"betas": (0.5, 0.6), "eps": 1e-3}
    assert {key: group[key] for key in expected} == expected


def test_settings_survive_their_way_as_plain_values() -> None:
    spec = OptimizerSpec("sgd", lr=0.1, betas=(0.8, 0.9))
    plain = asdict(spec) | {"betas": [0.8, 0.9]}  # JSON has lists only
    assert OptimizerSpec(**plain) == spec
