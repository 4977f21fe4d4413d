"""Optimizer settings are checked when they are made, and travel as plain values."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

from fedsplit.errors import FedsplitError, SettingsError
from fedsplit.execution import OptimizerSpec
from fedsplit.execution.optim import OPTIMIZERS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "lion"),
        ("name", "sparseadam"),
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


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("adamw", {"betas": (0.5, 0.6), "eps": 1e-3}),
        ("Adam", {"betas": (0.5, 0.6), "eps": 1e-3}),
        ("sgd", {"momentum": 0.75}),
        ("rmsprop", {"momentum": 0.75, "eps": 1e-3}),
    ],
)
def test_the_optimizer_gets_the_settings(name: str, own: dict[str, Any]) -> None:
    spec = OptimizerSpec(name, lr=0.5, weight_decay=0.25, **own, options={"maximize": True})
    (group,) = spec.build([nn.Parameter(torch.ones(2, 2))]).param_groups
    expected = {"lr": 0.5, "weight_decay": 0.25, "maximize": True, **own}
    assert {key: group[key] for key in expected} == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_and_transformers_is_made_with_its_own_defaults(name: str) -> None:
    given = {"relative_step": False} if name == "transformers.adafactor" else {}
    optimizer = OptimizerSpec(name, lr=0.1, options=given).build([nn.Parameter(torch.ones(2, 2))])
    assert type(optimizer) is OPTIMIZERS[name]
    fresh = type(optimizer)([nn.Parameter(torch.ones(2, 2))], lr=0.1, **given)
    ours, own = optimizer.defaults, fresh.defaults
    free = {"weight_decay": 0, "foreach": None}  # the latter changes no bit, see below
    assert {**ours, **free} == {**own, **free}


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_small_parameters_updated_at_once_get_the_bits_of_torchs_own_loop(
    name: str, options: dict[str, object]
) -> None:
    spec, found = OptimizerSpec(name, lr=1e-2, weight_decay=0.1, options=options), []
    for build in (spec.build, lambda own: OPTIMIZERS[name](own, **spec_of(spec), foreach=False)):
        draw = torch.Generator().manual_seed(0)
        own = [nn.Parameter(torch.randn(size, generator=draw)) for size in ((4, 9), (9, 4), (1,))]
        optimizer = build(own)
        for _ in range(10):
            for item in own:
                item.grad = torch.randn(item.shape, generator=draw)
            optimizer.step()
        found.append(torch.cat([item.detach().flatten() for item in own]))
        found.append(optimizer.defaults["foreach"])
    values, at_once, expected, _ = found
    assert at_once is True
    assert torch.equal(values, expected)


def spec_of(spec: OptimizerSpec) -> dict[str, Any]:
    """Return the keyword arguments of its class."""
    return {"lr": spec.lr, "weight_decay": spec.weight_decay, **spec.options}


def test_large_parameters_are_updated_one_by_one_and_whoever_says_how_is_obeyed() -> None:
    """All at once takes the memory of all once more."""
    large = [nn.Parameter(torch.empty(1 << 22)), nn.Parameter(torch.empty(1))]
    assert OptimizerSpec().build(large).defaults["foreach"] is None
    fused = OptimizerSpec(options={"fused": True}).build([nn.Parameter(torch.ones(2))])
    assert (fused.defaults["foreach"], fused.defaults["fused"]) == (None, True)


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"name": "lbfgs"}, "name='lbfgs': must be one of"),
        ({"name": "sgd", "betas": (0.9, 0.99)}, "betas=.*: must be None: sgd has none"),
        ({"name": "rprop", "weight_decay": 0.1}, "weight_decay=0.1: must be 0.0: rprop has none"),
        ({"options": {"amsgrat": True}}, "amsgrat=True: must be a known setting.*amsgrad"),
        ({"options": {"params": []}}, "params=.*: must be a known setting"),
        ({"options": {"lr": 1.0}}, "lr=1.0: must be a known setting"),
        ({"name": "sgd", "options": {"nesterov": True}}, "SGD takes .Nesterov momentum requires"),
        ({"name": "transformers.adafactor"}, "Adafactor takes .Cannot combine manual"),
        ({"schedule": "step"}, "train.schedule='step': must be one of constant, linear, cosine"),
        ({"schedule_over": "round"}, "train.schedule_over='round': must be one of run, turn"),
        ({"warmup": 1.5}, "train.warmup=1.5"),
        ({"warmup": -0.1}, "train.warmup=-0.1"),
        ({"clip": 0.0}, "train.clip=0.0"),
        ({"clip": float("inf")}, "train.clip=inf"),
        ({"accumulate": 0}, "train.accumulate=0"),
        ({"label_smoothing": 1.0}, "train.label_smoothing=1.0"),
    ],
    ids=str,
)
def test_what_a_recipe_cannot_be_is_refused(settings: dict[str, Any], refusal: str) -> None:
    with pytest.raises(SettingsError, match=refusal):
        OptimizerSpec(**settings)


def test_settings_survive_their_way_as_plain_values() -> None:
    spec = OptimizerSpec("adam", lr=0.1, betas=(0.8, 0.9), options={"amsgrad": True})
    plain = asdict(spec) | {"betas": [0.8, 0.9]}  # JSON has lists only
    assert OptimizerSpec(**plain) == spec
