"""Turns of every architecture with all options at once train what plain transformers + PEFT does.

The oracle is a loop of torch's over PEFT's model that knows nothing of cuts, links and shares. It
draws dropout as a turn does: from the turn's seed, the mini-batch, and where a segment begins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from benchmarks._ways import plain_model, with_dropout
from fedsplit.data import Batch
from fedsplit.execution import OptimizerSpec
from fedsplit.execution.tier import dropout_seed
from fedsplit.models import ModelSpec
from fedsplit.models.anatomy import anatomy
from fedsplit.models.tiny import tiny_config
from fedsplit.plan import Route
from tests.conformance.test_architectures import ARCHITECTURES, TARGETS
from tests.execution.test_recipe import ROUTES
from tests.tiny_split import BLOCKS, Cluster, differing, initial

SEED, ROUNDING = 5, 5e-5
PLAIN = OptimizerSpec("sgd", lr=0.1)
# On every tier embeddings run before a segment's blocks, and would draw as the unsplit ones do not.
DROPS_EMBEDDINGS = {"gpt2": "embd_pdrop", "gpt_neox": "hidden_dropout"}
OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"lora": {"use_rslora": True}},
    "dora": {"lora": {"use_dora": True}},
    "dropout": {"dropout": 0.2},
    "clip": {"clip": 1e-3, "lr": 50.0},  # below every norm here; moves as far
    "accumulate": {"accumulate": 2},
    "checkpointing": {"checkpointing": True},
}
ALL = {
    **{name: value for option in OPTIONS.values() for name, value in option.items()},
    "lora": {"use_rslora": True, "use_dora": True},
}
UNCLIPPED = {**ALL, "clip": None, "lr": PLAIN.lr}
LENGTHS = ((8, 3, 5), (4, 6, 2), (7, 7, 7), (2, 3, 2))  # mini-batches as long as their longest


def spec_of(model_type: str, options: Mapping[str, Any]) -> ModelSpec:
    config = tiny_config(model_type, BLOCKS)
    dropout = options.get("dropout", 0.0)
    with_dropout(config, dropout)
    if model_type in DROPS_EMBEDDINGS:
        setattr(config, DROPS_EMBEDDINGS[model_type], 0.0)
    fields = config.to_diff_dict()
    fields.pop("model_type")
    return ModelSpec(
        model_type=model_type,
        config=fields,
        target_modules=TARGETS.get(model_type),
        r=4,
        dropout=dropout,
        lora=options.get("lora", {}),
    )


def batches() -> list[Batch]:
    draw, found = torch.Generator().manual_seed(0), []
    for index, lengths in enumerate(LENGTHS):
        ids = torch.randint(3, 100, (len(lengths), max(lengths)), generator=draw)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs["labels"] = ids.masked_fill(mask == 0, -100)
        found.append(Batch(inputs, tuple(range(3 * index, 3 * index + 3))))
    return found


def unsplit(
    model: ModelSpec,
    adapters: Mapping[str, Tensor],
    route: Route,
    data: Sequence[Batch],
    recipe: OptimizerSpec,
) -> dict[str, Tensor]:
    """Return what a plain loop makes of `adapters`, with dropout as `route` draws it."""
    config = model.load_config()
    plain = plain_model(model, config, stirred=False).train()
    set_peft_model_state_dict(plain, dict(adapters))
    names, step = anatomy(config, model.task).blocks, 0
    first, *others = route.segments
    for segment in others:
        plain.base_model.model.get_submodule(names[segment.start]).register_forward_pre_hook(
            lambda *_, at=segment: torch.manual_seed(dropout_seed(SEED, step, at)) and None
        )
    trained = [value for value in plain.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=recipe.lr)
    for start in range(0, len(data), recipe.accumulate):
        group = [batch.inputs for batch in data[start : start + recipe.accumulate]]
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in group]
        for batch, count in zip(group, counts, strict=True):
            torch.manual_seed(dropout_seed(SEED, step, first))
            (plain(**batch).loss * (count / sum(counts))).backward()
            step += 1
        if recipe.clip is not None:
            assert torch.nn.utils.clip_grad_norm_(trained, recipe.clip) > recipe.clip
        optimizer.step()
        optimizer.zero_grad()
    return get_peft_model_state_dict(plain)


def compare(model_type: str, options: Mapping[str, Any], route: Route) -> float:
    """Return the largest difference of a value, beside the most that one has moved; 0: no bit."""
    model, data = spec_of(model_type, options), batches()
    recipe = replace(PLAIN, **{k: v for k, v in options.items() if hasattr(PLAIN, k)})
    start = initial(model)
    expected = unsplit(model, start, route, data, recipe)
    with Cluster(model) as cluster:
        _, found = cluster.train(route, data, start, recipe, SEED)
    if not differing(found, expected):
        return 0.0
    assert found.keys() == expected.keys()
    moved = max(float((expected[name] - start[name]).abs().max()) for name in start)
    return max(float((found[name] - expected[name]).abs().max()) for name in start) / moved


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_all_options_at_once(model_type: str) -> None:
    """Clipping rounds, as a norm is a sum over tiers."""
    assert compare(model_type, ALL, Route.parse(ROUTES[-1], BLOCKS)) < ROUNDING


def test_without_clipping_all_options_at_once_are_exact() -> None:
    assert compare("llama", UNCLIPPED, Route.parse(ROUTES[-1], BLOCKS)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_option_by_itself(model_type: str, option: str) -> None:
    off = compare(model_type, OPTIONS[option], Route.parse(ROUTES[-1], BLOCKS))
    assert off < ROUNDING if option == "clip" else off == 0


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_all_options_at_once_on_every_route(model_type: str, route: str) -> None:
    assert compare(model_type, ALL, Route.parse(route, BLOCKS)) < ROUNDING
    assert compare(model_type, UNCLIPPED, Route.parse(route, BLOCKS)) == 0
