"""Adapters of several ranks: one of a lower rank is the first components of one of a higher.

All have the same scale, ``alpha`` over the rank of the whole adapter (`ModelSpec`), so that a
component means the same at every rank: an adapter of rank r is one of a higher rank whose other
components are zero.

Beside a factor may stand a *residual*: components that earlier rounds left, of any number and at
the same scale, that go wherever the factor goes and are trained nowhere: a change of the frozen
weights that travels as factors.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from fedsplit.errors import FedsplitError

_AXES = {
    ".lora_A.weight": 0,
    ".lora_embedding_A": 0,
    ".lora_B.weight": 1,
    ".lora_embedding_B": 1,
}


_FACTOR, _RESIDUAL = "lora_", "residual_"


def rank_axis(name: str) -> int | None:
    """Return the axis along which an adapter tensor has its components; None: it has none."""
    return next((axis for end, axis in _AXES.items() if name.endswith(end)), None)


def residual_of(name: str) -> str | None:
    """Return the name of the residual beside the factor called `name`; None if it is no factor."""
    if rank_axis(name) is None:
        return None
    head, _, end = name.rpartition(_FACTOR)
    return f"{head}{_RESIDUAL}{end}"


def factor_of(name: str) -> str | None:
    """Return the name of the factor whose residual is called `name`; None if it is none."""
    head, found, end = name.rpartition(_RESIDUAL)
    factor = f"{head}{_FACTOR}{end}"
    return factor if found and rank_axis(factor) is not None else None


def with_residuals(names: Iterable[str], adapters: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return `names`, and those of the residuals in `adapters` that stand beside them."""
    listed = tuple(names)
    beside = (residual_of(name) for name in listed)
    return (*listed, *(name for name in beside if name is not None and name in adapters))


def trained(adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `adapters` without residuals."""
    return {name: tensor for name, tensor in adapters.items() if factor_of(name) is None}


def residuals(adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the residuals among `adapters`."""
    return {name: tensor for name, tensor in adapters.items() if factor_of(name) is not None}


def residual_rank(adapters: Mapping[str, Tensor]) -> int:
    """Return how many components the largest residual among `adapters` has."""
    sizes = [
        tensor.shape[axis]
        for name, tensor in adapters.items()
        if (axis := rank_axis(factor_of(name) or "")) is not None
    ]
    return max(sizes, default=0)


def pair_of(name: str) -> str | None:
    """Return the name of the B that belongs to the A called `name`; None if it is no A."""
    if rank_axis(name) != 0:
        return None
    head, _, end = name.rpartition("lora_")
    return f"{head}lora_{end.replace('A', 'B')}"


def at_rank(adapters: Mapping[str, Tensor], rank: int | None) -> Mapping[str, Tensor]:
    """Return the first `rank` components of `adapters`; with None all of them, as they are."""
    if rank is None:
        return adapters
    return {name: first_components(name, tensor, rank) for name, tensor in adapters.items()}


def first_components(name: str, tensor: Tensor, rank: int | None) -> Tensor:
    """Return the first `rank` components of the adapter tensor `name`, or all it has if fewer."""
    axis = rank_axis(name)
    if rank is None or axis is None or tensor.shape[axis] <= rank:
        return tensor
    return tensor.narrow(axis, 0, rank).contiguous()


def put_back(part: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `part` with the components of `whole` behind those that it has."""
    return {name: _put_back(name, tensor, whole[name]) for name, tensor in part.items()}


def _put_back(name: str, tensor: Tensor, whole: Tensor) -> Tensor:
    axis = rank_axis(name)
    if axis is None or tensor.shape == whole.shape:
        return tensor
    merged = whole.to(tensor.dtype, copy=True)
    merged.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return merged


def fits(name: str, tensor: Tensor, like: Tensor) -> bool:
    """Return whether a tensor is of the shape of `like`, but for fewer components."""
    if tensor.shape == like.shape:  # so it mostly is, and this is asked over and over
        return True
    shape, axis = list(tensor.shape), rank_axis(factor_of(name) or name)
    if axis is not None and len(shape) == like.dim() and 1 <= shape[axis] <= like.shape[axis]:
        shape[axis] = like.shape[axis]
    return shape == list(like.shape)


def require_fit(name: str, tensor: Tensor, like: Tensor) -> None:
    """Refuse a tensor of another shape than that of `like`, but for fewer components.

    Raises
    ------
    FedsplitError
        Naming it.
    """
    if not fits(name, tensor, like):
        raise FedsplitError(
            f"adapter {name!r}: shape={tuple(tensor.shape)} must be {tuple(like.shape)}"
        )


def require_pairs(adapters: Mapping[str, Tensor]) -> None:
    """Refuse an A that has not as many components as its B, and half a residual.

    Raises
    ------
    FedsplitError
        Naming it.
    """
    for name in adapters:
        other = pair_of(name)
        if other is None:
            continue
        for first, second in ((name, other), (residual_of(name), residual_of(other))):
            a, b = adapters.get(first or ""), adapters.get(second or "")
            if first != name and (a is None) != (b is None):
                raise FedsplitError(f"adapter {(first if a is None else second)!r}: is missing")
            if a is not None and b is not None and b.shape[1] != a.shape[0]:
                raise FedsplitError(
                    f"adapter {first!r}: shape={tuple(a.shape)} must be of the rank of "
                    f"{tuple(b.shape)}"
                )
