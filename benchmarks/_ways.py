"""Ways to train that `benchmarks.conformance` compares, and a step of each, split and unsplit."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import PretrainedConfig

from fedsplit.models import ModelSpec, SplitModel
from fedsplit.models import routes as trials
from fedsplit.models.adapters import peft_key
from fedsplit.models.anatomy import anatomy
from fedsplit.models.crossing import IGNORED_LABEL
from fedsplit.models.loading import assemble
from fedsplit.models.lora import lora_config
from fedsplit.models.routes import gradients
from fedsplit.models.spec import model_class
from fedsplit.models.tiny import example_inputs, packed_and_not
from fedsplit.models.weights import stir, weights_dtype
from fedsplit.plan import Route

# Not of whole layers: which are left out is drawn outside blocks.
_DROPS = re.compile("(?<!layer)dropout$|(?<!layer)pdrop$|attn_drop$|resid_drop$")


@dataclass(frozen=True, kw_only=True)
class Option:
    """A way to train.

    Parameters
    ----------
    lora : mapping
        Fields of LoraConfig.
    checkpointing : bool
        Whether blocks are computed again in the backward pass.
    dropout : float
        Of adapters, and of all of the model's layers that have one. Every block draws from a seed
        of its own, split and unsplit.
    parts : int
        Mini-batches of the step, each weighted by its targets.
    shorter : bool
        Whether the mini-batch is only as long as its longest text.
    leaves_out : bool
        Whether what nothing depends on stays where it is: padding at the right.
    packing : bool
        Whether rows hold two texts; the unsplit model is given each by itself.
    """

    lora: Mapping[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    dropout: float = 0.0
    parts: int = 1
    shorter: bool = False
    leaves_out: bool = False
    packing: bool = False


OPTIONS = {
    "plain": Option(),
    "rslora": Option(lora={"use_rslora": True}),
    "dora": Option(lora={"use_dora": True}),
    "checkpointing": Option(checkpointing=True),
    "dropout": Option(dropout=0.2, checkpointing=True),
    "accumulate": Option(parts=2),
    "longest": Option(shorter=True),
    "no padding": Option(leaves_out=True),
    "packing": Option(packing=True),
}


def plain_model(spec: ModelSpec, config: PretrainedConfig, *, stirred: bool) -> Any:
    """Return the unsplit model of transformers, in PEFT's wrapper but for full training.

    It is built and adapted without fedsplit; only the values of its weights are copied from a whole
    fedsplit model, `stirred` or as it is, and their names must match to the last one.
    """
    ours = assemble(spec, config, None, torch.device("cpu")).model
    if stirred:
        stir(ours, spec.seed)
    dtype = weights_dtype(spec, config)
    plain = model_class(config, spec.task)._from_config(config, dtype=dtype)
    if spec.train == "full":
        plain.load_state_dict(ours.state_dict())
        return plain
    adapted = get_peft_model(plain, lora_config(spec, plain))
    adapted.load_state_dict(
        {f"base_model.model.{name}": value for name, value in ours.state_dict().items()}
    )
    return adapted


def plain_gradients(
    spec: ModelSpec, config: PretrainedConfig, *batches: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """Return the gradients of one step of transformers + PEFT, with the weights that `spec` gives.

    Of several `batches` each is weighted by its targets.
    """
    model = plain_model(spec, config, stirred=True)
    if spec.train == "full":
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        _step(model.train(), batches)
        return {name: value.grad for name, value in trained.items()}
    if spec.dropout:
        _seed_blocks(model.base_model.model, config)
    _step(model.train(), batches)
    found = {
        peft_key(name).removeprefix("base_model.model."): value.grad
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    aliases = set(get_peft_model_state_dict(model)) - set(found)
    # Beside an adapter on the embeddings PEFT saves those too, frozen as they are.
    frozen = {name for name in aliases if ".base_layer." in name}
    tied = {name for name in aliases - frozen if name in dict(model.named_parameters())}
    assert not tied, f"PEFT saves adapters that are not trained: {sorted(tied)[:3]}"
    return found


def _step(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> None:
    for batch, share in zip(batches, _shares(batches), strict=True):
        torch.manual_seed(0)
        (model(**batch).loss * share).backward()


def _n_targets(labels: Tensor) -> int:
    """Return how many labels count: of tokens all but the first, which nothing predicts."""
    return int(((labels[:, 1:] if labels.dim() == 2 else labels) != IGNORED_LABEL).sum())


def _shares(batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """Return the part of all targets that each mini-batch has."""
    counts = [_n_targets(batch["labels"]) for batch in batches]
    return [count / sum(counts) for count in counts]


def _seed_blocks(model: Any, config: PretrainedConfig) -> None:
    """Have every block draw from a seed of its own, whoever runs before it."""
    for index, name in enumerate(anatomy(config, "causal-lm").blocks):
        model.get_submodule(name).register_forward_pre_hook(
            lambda *_, index=index: torch.manual_seed(1 + index) and None
        )


def split_gradients(
    spec: ModelSpec,
    config: PretrainedConfig,
    route: Route,
    batches: Sequence[Mapping[str, Tensor]],
    option: Option,
) -> dict[str, Tensor | None]:
    """Return the gradients of the same step along `route`."""

    def seeded(*given: Any) -> SplitModel:
        model = assemble(*given)
        if option.dropout:
            torch.manual_seed(0)  # for what comes before the first block
            _seed_blocks(model.model, config)
        return model

    found: dict[str, Tensor | None] = {}
    for batch, share in zip(batches, _shares(batches), strict=True):
        kept = batch["attention_mask"].bool() if option.leaves_out else None
        with patch.object(trials, "assemble", seeded):
            part = gradients(
                spec, config, route, batch, checkpointing=option.checkpointing, kept=kept
            )
        for name, value in part.items():
            before = found.get(name)
            part_of_it = None if value is None else value * share  # half: exact
            found[name] = part_of_it if before is None or value is None else before + part_of_it
    return found


def with_dropout(config: PretrainedConfig, share: float) -> None:
    """Set all dropout within a model's blocks, where there is any."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and _DROPS.search(name):
            setattr(config, name, share)


def batches_of(config: PretrainedConfig, option: Option) -> tuple[list[Any], list[Any]]:
    """Return the mini-batches of the split model's step, and of the unsplit one's."""
    inputs = example_inputs(config, "causal-lm")
    if option.packing:
        together, alone = packed_and_not(inputs["input_ids"])
        return [together], [alone]
    if option.parts > 1:  # of as many targets each, so that shares are exact
        rows = [example_inputs(config, "causal-lm", seed) for seed in range(option.parts)]
        parts = [{name: value[:1] for name, value in row.items()} for row in rows]
        return parts, parts
    if option.shorter:
        short = {
            name: value[1:, : int(inputs["attention_mask"][1].sum())]
            for name, value in inputs.items()
        }
        return [short], [{name: value[1:] for name, value in inputs.items()}]
    return [inputs], [inputs]
