"""What single operators cost and write, and how they run on tensors without data."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsplit.models.private import (
    GROUPED_MM,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    tree_leaves,
)

aten = torch.ops.aten


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    count = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return int(count)


def _sdpa_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    shapes = (gradient.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _grouped_mm(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    # Rows are shared out over the groups, so each row of the operand without groups counts once.
    return 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]


def _fake_grouped_mm(left: Tensor, right: Tensor, offsets: Tensor, *_: Any, **__: Any) -> Tensor:
    # Torch's own shape function knows bfloat16 alone.
    groups = [] if right.dim() == 3 else [offsets.shape[0]]
    return left.new_empty([*groups, left.shape[0], right.shape[-1]])


# Torch's own formulas, and those of three operators that it leaves uncounted on a CPU.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}
if GROUPED_MM is not None:
    _FLOPS[GROUPED_MM] = _grouped_mm

# Their results depend on an argument's shape, not on its values.
SHAPE_ONLY = {
    aten.empty_like,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.rand_like,
    aten.randn_like,
    aten.new_empty,
    aten.new_empty_strided,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
}


def run_fake(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what the operator `func` returns on tensors without data."""
    run = _fake_grouped_mm if func._overloadpacket is GROUPED_MM else func
    return run(*args, **kwargs)


def flops_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> float:
    """Return the FLOPs of the operator `func`, 0 where none are counted."""
    count = _FLOPS.get(func._overloadpacket)
    if count is None:
        return 0.0
    if count in (_sdpa, _sdpa_backward, _grouped_mm):
        return float(count(*args, **kwargs))
    return float(count(*args, **kwargs, out_val=output))


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the arguments that `func` overwrites."""
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += tensors_in(value)
    return written


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of `tree`."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
