"""Checkpoints: what their files hold, and whether that is the model's own weights, all of them.

A checkpoint that does not fit would train all the same, from random weights in place of those not
found. So every stored tensor must have a place in the model and every weight of the model must be
stored, in a plain floating point type; whatever else is refused by name.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fedsplit.models.files import PLAIN, Checkpoint, Stored, few, wrong
from fedsplit.models.names import CLASSIFIERS
from fedsplit.models.private import Renamed, load_weights
from fedsplit.models.spec import ModelSpec

Owns = Callable[[str], bool]

_PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|absmax|quant_map|quant_state\..+"
    r"|weight_(scale|scale_inv|packed|zero_point|shape)|input_scale|scale|zero_point)$"
)
# Masks that older releases stored; they are computed today, and no release names them all.
_COMPUTED = re.compile(r"\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "module.": "DataParallel or DeepSpeed",
    "base_model.model.": "PEFT, to be merged with `merge_and_unload` first",
}


def check_fit(model: PreTrainedModel, spec: ModelSpec, dtype: torch.dtype) -> None:
    """Refuse a checkpoint that is not `model`'s own; only the headers of its files are read.

    Parameters
    ----------
    model : PreTrainedModel
        On the meta device; whatever fits is put in its place there, without values.
    spec : ModelSpec
        Names the checkpoint.
    dtype : torch.dtype
        The type that it is to be read in.

    Raises
    ------
    FedsplitError
        Naming the first few tensors that are missing, left over, quantised or of another shape.
    """
    with Checkpoint(str(spec.source)) as checkpoint:
        headers = checkpoint.headers()
    renamed = Renamed(model)
    _refuse_quantised(model, spec, headers, renamed)
    blank = {
        name: torch.empty(stored.shape, dtype=_PLAIN[stored.dtype], device="meta")
        for name, stored in headers.items()
    }
    info = load_weights(model, blank, renamed, dtype, "meta")
    _refuse(model, spec, info, lambda _: True, {renamed(key) for key in headers})


def read_weights(
    model: PreTrainedModel, spec: ModelSpec, owns: Owns, dtype: torch.dtype
) -> set[str]:
    """Load the weights that ``owns(name)`` of a checkpoint; return which of them are absent.

    Absent are those that no tensor is stored for, be it that they are tied to another one, or part
    of a new head; of weights that are not owned, only those tied to others.

    Raises
    ------
    FedsplitError
        As `check_fit`, as far as it concerns what is owned.
    """
    expected = model.state_dict()
    renamed = Renamed(model)
    with Checkpoint(str(spec.source)) as checkpoint:
        _refuse_quantised(model, spec, checkpoint.headers(), renamed)
        targets = {key: renamed(key) for key in checkpoint.slices}
        slices = {
            key: checkpoint.slices[key]
            for key, target in targets.items()
            if target is None or owns(target)
        }
        info = load_weights(model, slices, renamed, dtype)
    found, tied = set(targets.values()), model.all_tied_weights_keys
    _refuse(model, spec, info, owns, found)
    return {name for name in expected if (name not in found if owns(name) else name in tied)}


def stored_dtype(source: str) -> torch.dtype | None:
    """Return the type of the first floating point tensor of a checkpoint, if there is one."""
    with Checkpoint(source) as checkpoint:
        types = (_PLAIN.get(stored.dtype) for stored in checkpoint.headers().values())
        return next((found for found in types if found and found.is_floating_point), None)


def _refuse_quantised(
    model: PreTrainedModel, spec: ModelSpec, headers: Mapping[str, Stored], renamed: Renamed
) -> None:
    """Refuse integer and float8 types in place of the model's floating point weights."""
    expected = model.state_dict()
    odd = []
    for key, stored in headers.items():
        plain = _PLAIN.get(stored.dtype)
        target = renamed(key)
        floating = target is not None and expected[target].is_floating_point()
        if plain is None or (floating and not plain.is_floating_point):
            odd.append(f"{key} is {stored.dtype}")
    if odd:
        raise wrong(spec.source, f"{few(odd)} in type; {PLAIN}")


def _refuse(
    model: PreTrainedModel, spec: ModelSpec, info: Any, owns: Owns, found: Collection[str | None]
) -> None:
    """Refuse what transformers' report on loading says does not fit; `found` has its place."""
    missing = _not_tied(model, {name for name in info.missing_keys if owns(name)}, owns)
    left_over = {name for name in info.unexpected_keys if not _COMPUTED.search(name)}
    shapes = {name: (has, wanted) for name, has, wanted in info.mismatched_keys}
    new_head = _new_head(model, spec, found)
    missing -= new_head
    shapes = {name: pair for name, pair in shapes.items() if name not in new_head}
    if not missing and (new_head or type(spec.read_config()) is not type(model.config)):
        # A backbone whose old head is not wanted, or the text part of a multimodal model.
        left_over = {name for name in left_over if _is_of_the_model(model, name)}
    kind = type(model).__name__
    parts = []
    if left_over:
        parts.append(f"{len(left_over)} of its tensors are not in {kind}: {few(left_over)}")
    if missing:
        parts.append(f"it lacks {len(missing)} of the weights of {kind}: {few(missing)}")
    if parts:
        hint = _explain(left_over, missing)
        raise wrong(spec.source, "; ".join([*parts, hint] if hint else parts))
    if shapes or info.conversion_errors:
        odd = [
            f"{name} is {_shape(has)}, not {_shape(want)}" for name, (has, want) in shapes.items()
        ]
        odd += map(str, info.conversion_errors)
        raise wrong(spec.source, f"its weights do not fit the configuration: {few(odd)}")


def _new_head(model: PreTrainedModel, spec: ModelSpec, found: Collection[str | None]) -> set[str]:
    """Return the weights of the classifier, if it is a new one that the task asks for."""
    if spec.task not in CLASSIFIERS:
        return set()
    backbone = f"{model.base_model_prefix}."
    head = {name for name in model.state_dict() if not name.startswith(backbone)}
    return head if head.isdisjoint(found) or "num_labels" in spec.config else set()


def _not_tied(model: PreTrainedModel, missing: set[str], owns: Owns) -> set[str]:
    """Return the `missing` names without those that are tied to a weight that is there."""
    groups: dict[str, set[str]] = defaultdict(set)
    for name, source in model.all_tied_weights_keys.items():
        groups[source] |= {name, source}
    for group in groups.values():
        if any(owns(name) for name in group - missing):
            missing = missing - group
    return missing


def _is_of_the_model(model: PreTrainedModel, name: str) -> bool:
    """Return whether `name` is inside a module that `model` or its backbone has."""
    first = name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    return any(
        isinstance(getattr(part, first, None), nn.Module) for part in (model, model.base_model)
    )


def _explain(left_over: Collection[str], missing: Collection[str]) -> str:
    """Return the likely reason for names that do not fit, or an empty text."""
    if any(_QUANTISED.search(name) for name in left_over):
        return f"it is quantised; {PLAIN}"
    if any(".lora_" in name for name in left_over):
        return "it holds adapters, which have to be merged into the weights (`merge_and_unload`)"
    for wrapper, origin in _WRAPPERS.items():
        inside = re.compile(r"(^|\.)" + re.escape(wrapper))
        if any(inside.sub(r"\1", name) in missing for name in left_over):
            return f"names with {wrapper!r} come from {origin}; take it out of all names"
    for name in sorted(left_over):
        for wanted in missing:
            if name.endswith(f".{wanted}"):
                return f"take {name.removesuffix(wanted)!r} off the front of the names"
    if not left_over and all("lm_head" in name or "embed_out" in name for name in missing):
        return "it was saved without its head, or its head is tied to the embeddings, which "\
               "tie_word_embeddings=true says"  # fmt: skip
    return ""


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
