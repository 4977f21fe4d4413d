"""What a model costs, block by block: counted from its operations, or timed on this machine."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fedsplit.errors import FedsplitError, require
from fedsplit.layergraph import LayerGraph
from fedsplit.mapping import from_mapping, to_mapping
from fedsplit.models.adapters import add_adapters, is_adapter, peft_key
from fedsplit.models.blocks import find_blocks
from fedsplit.models.boundary import Boundary
from fedsplit.models.crossing import travelling
from fedsplit.models.graph import layer_graph
from fedsplit.models.graph_memory import peak_bytes
from fedsplit.models.graph_trace import Operation, Parameter, Trace, trace
from fedsplit.models.known import recall, remember
from fedsplit.models.names import CAUSAL, IMAGES
from fedsplit.models.ranks import pair_of, rank_axis
from fedsplit.models.spec import ModelSpec
from fedsplit.models.tiny import image_size
from fedsplit.models.weights import build, weights_dtype
from fedsplit.profiles import (
    Crossing,
    LowRank,
    ModelProfile,
    SharedWeights,
    TensorForm,
    UnitProfile,
)

OPTIMIZER_COPIES = 2
"""State that AdamW keeps per trained parameter."""


def profile_model(spec: ModelSpec, seq_len: int, batch: int = 1) -> ModelProfile:
    """Return what the model of `spec` costs, without weights or data.

    The answer is kept on disk (`fedsplit.models.known`).

    Parameters
    ----------
    spec : ModelSpec
        Model and adapters. A frozen block's backward pass computes gradients of activations and
        adapters alone; blocks before the first adapter have none.
    seq_len : int
        Tokens of a sample; images have a size of their own and ignore it.
    batch : int
        Samples of the batch that is traced. Figures are per sample; what a batch shares (masks)
        is divided among its samples.

    Raises
    ------
    FedsplitError
        If the model is unknown, has no blocks, or its computation depends on the data.
    """
    # What a model costs does not depend on its weights.
    config = spec.load_config()
    dtype = str(weights_dtype(spec, config))
    fields = str(replace(spec, seed=0)), config.to_dict(), dtype, seq_len, batch
    key = json.dumps(fields, sort_keys=True, default=str)
    known = recall("profile", key)
    if isinstance(known, dict):
        with contextlib.suppress(FedsplitError):
            return from_mapping(ModelProfile, known, "profile")
    model = planned_model(spec)
    inputs = example_batch(model.config, spec.task, seq_len, batch)
    name = spec.source or str(spec.model_type)
    profile = profile_module(model, inputs, find_blocks(model), name, seq_len)
    onward = travelling(inputs, with_ids=spec.share_token_ids)
    forms = {key: _form(value) for key, value in onward.items()}
    labels = {key: forms.pop(key) for key in ("labels",) if key in forms}
    crossing = replace(profile.crossing, inputs=forms, labels=labels)
    profile = replace(profile, crossing=crossing, rank=spec.r if spec.train == "lora" else None)
    remember("profile", key, to_mapping(profile))
    return profile


def profile_graph(spec: ModelSpec, seq_len: int, batch: int = 1) -> LayerGraph:
    """Return the graph of the model of `spec`, without weights or data.

    Parameters are those of `profile_model`; a model without a list of blocks has a graph all the
    same, but none of its vertices belongs to a block.
    """
    model = planned_model(spec)
    inputs = example_batch(model.config, spec.task, seq_len, batch)
    blocks: tuple[str, ...] = ()
    with contextlib.suppress(FedsplitError):
        blocks = find_blocks(model)
    return layer_graph(model, inputs, blocks, spec.source or str(spec.model_type))


def profile_module(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    blocks: Sequence[str],
    name: str | None = None,
    seq_len: int = 1,
) -> ModelProfile:
    """Return what any `model` costs, traced on `inputs` (see `fedsplit.models.graph`).

    A parameter counts to every unit that uses it, for each tier needs a copy; `ModelProfile.shared`
    says which do.
    """
    traced = trace(model, inputs, blocks)
    samples = next(iter(inputs.values())).shape[0]
    units, kept = [], 0.0
    for position, peak in enumerate(peak_bytes(model, inputs, blocks), start=-1):
        unit = _unit(traced, position, samples)
        kept += unit.activation_bytes
        units.append(replace(unit, workspace_bytes=max(peak / samples - kept, 0.0)))
    return ModelProfile(
        name or type(model).__name__,
        seq_len,
        units[0],
        tuple(units[1:-1]),
        units[-1],
        shared=_shared_weights(traced),
        crossing=_crossing(traced),
    )


def planned_model(spec: ModelSpec) -> PreTrainedModel:
    """Return the model of `spec` in training mode, its weights taking no memory."""
    model = build(spec, spec.load_config(), lambda _: False)
    if spec.train == "lora":
        add_adapters(model, spec, lambda _: False)
    for name, parameter in model.named_parameters():
        frozen = spec.freeze_a and rank_axis(peft_key(name)) == 0
        parameter.requires_grad_(spec.train == "full" or (is_adapter(name) and not frozen))
    model.train()
    return model


def example_batch(
    config: PretrainedConfig, task: str, seq_len: int, batch: int
) -> dict[str, Tensor]:
    """Return inputs with labels of the given shape, all zero."""
    require(batch >= 1, "batch", batch, "at least 1")
    if task == IMAGES:
        shape = (batch, config.num_channels, *image_size(config))
        return {
            "pixel_values": torch.zeros(shape),
            "labels": torch.zeros(batch, dtype=torch.long),
        }
    require(seq_len >= 2, "seq_len", seq_len, "at least 2")
    ids = torch.zeros(batch, seq_len, dtype=torch.long)
    labels = ids if task == CAUSAL else torch.zeros(batch, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _users(traced: Trace) -> list[set[int]]:
    """Return the parameters that each unit uses, embeddings first."""
    used: list[set[int]] = [set() for _ in range(traced.blocks + 2)]
    for step in traced.operations:
        used[step.block + 1] |= step.parameters
    return used


def _shared_weights(traced: Trace) -> tuple[SharedWeights, ...]:
    """Return the parameters that several units use, by who uses them."""
    users: dict[int, list[int]] = {}
    for unit, used in enumerate(_users(traced)):
        for item in used:
            users.setdefault(item, []).append(unit)
    alike: dict[tuple[int, ...], list[Parameter]] = {}
    for item, units in users.items():
        if len(units) > 1:
            alike.setdefault(tuple(units), []).append(traced.parameters[item])
    return tuple(
        SharedWeights(
            units,
            sum(weight.n_bytes for weight in weights),
            sum(weight.n_bytes for weight in weights if weight.trainable),
            OPTIMIZER_COPIES * sum(weight.n_bytes for weight in weights if weight.trainable),
        )
        for units, weights in sorted(alike.items())
    )


def _crossing(traced: Trace) -> Crossing:
    """Return the form of the boundary behind the first block."""
    tensor = traced.boundaries[min(1, traced.blocks)]
    if tensor is None:
        return Crossing()
    layout = Boundary.pack({"output": tensor, "shared": {}}).layout
    return Crossing(_form(tensor), layout)


def _form(tensor: Tensor) -> TensorForm:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorForm(dtype, tensor.dtype.itemsize, tuple(tensor.shape[1:]))


def _unit(traced: Trace, position: int, samples: int) -> UnitProfile:
    """Return the cost of block `position`; -1 is what comes before the first."""
    inside = [step for step in traced.operations if step.block == position]
    used = _users(traced)[position + 1]
    weights = [traced.parameters[item] for item in used]
    adapter = sum(weight.n_bytes for weight in weights if weight.trainable)

    def per_sample(read: str) -> float:
        return float(sum(getattr(step, read) for step in inside)) / samples

    last = position == traced.blocks
    return UnitProfile(
        forward_flops=per_sample("forward_flops"),
        backward_flops=per_sample("backward_flops"),
        parameter_bytes=sum(weight.n_bytes for weight in weights),
        adapter_bytes=adapter,
        optimizer_bytes=OPTIMIZER_COPIES * adapter,
        activation_bytes=per_sample("saved_bytes"),
        boundary_bytes=0.0 if last else traced.boundary_bytes[position + 1] / samples,
        low_rank=_low_rank(traced, used, inside, samples),
    )


def _low_rank(
    traced: Trace, used: set[int], inside: Sequence[Operation], samples: int
) -> tuple[LowRank, ...]:
    """Return the pairs of factors among the parameters `used`, those of one `most` as one."""
    named = {peft_key(traced.parameters[item].name): item for item in used}
    found: dict[float, LowRank] = {}
    for name, item in named.items():
        other = named.get(pair_of(name) or "")
        if other is None:
            continue
        a, b = traced.parameters[item], traced.parameters[other]
        most = min(math.prod(a.shape[1:]), b.shape[0]) / a.shape[0]
        flops = sum(step.forward_flops for step in inside if step.parameters & {item, other})
        before = found.get(most, LowRank(0.0, 0.0, most))
        n_bytes = before.n_bytes + a.n_bytes + b.n_bytes
        found[most] = LowRank(n_bytes, before.forward_flops + flops / samples, most)
    return tuple(found[most] for most in sorted(found))
