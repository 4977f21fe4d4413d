"""What crosses a cut, and what the end of a route gives back."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fedsplit.errors import FedsplitError

# Bounds of a layout that came from elsewhere: characters, nesting, nodes.
_LENGTH, _DEPTH, _NODES = 1 << 16, 8, 1 << 10
_ABSENT, _TENSOR = 0, 1
_SEQUENCES: dict[str, type[list[Any]] | type[tuple[Any, ...]]] = {"list": list, "tuple": tuple}
_NAMES = {kind: name for name, kind in _SEQUENCES.items()}
_NUMBERED = "numbered"


@dataclass(frozen=True)
class Boundary:
    """The tensors that a block hands to the next one, where a route is cut.

    Parameters
    ----------
    tensors : tuple of Tensor
        The tensors that matter to what follows, usually one of shape ``[batch, tokens, hidden]``.
    layout : str
        JSON text that says how the block returned them: 1 for a tensor, 0 for what does not
        travel, ``["list", ...]``, ``["tuple", ...]``, an object for a dict, or ``["numbered",
        [key, ...], ...]`` for one with whole numbers as keys. It names no types and no code: a
        received one is data, however it was made.
    kept : tuple of Tensor or None
        Of each tensor, boolean ``[batch, tokens]`` on the CPU: where it holds something; nothing
        depends on its values elsewhere, which do not travel. None, or no tuple: all of it.
    """

    tensors: tuple[Tensor, ...]
    layout: str
    kept: tuple[Tensor | None, ...] = ()

    @classmethod
    def pack(cls, values: Any) -> "Boundary":
        """Return the boundary that carries the tensors of nested dicts, lists and tuples.

        What is neither tensor nor container becomes None.

        Raises
        ------
        FedsplitError
            If tensors lie in a container of another type, or the keys of a dict are neither all
            text nor all whole numbers.
        """
        tensors: list[Tensor] = []
        tree = _describe(values, tensors)
        return cls(tuple(tensors), json.dumps(tree, separators=(",", ":")))

    def unpack(self) -> Any:
        """Return the dicts, lists and tuples that were packed, with these tensors.

        Raises
        ------
        FedsplitError
            If the layout does not describe these tensors.
        """
        try:
            if len(self.layout) > _LENGTH:
                raise ValueError(f"at most {_LENGTH} characters")
            tensors = iter(self.tensors)
            found = _Builder(tensors).build(json.loads(self.layout))
            if next(tensors, None) is not None:
                raise ValueError("some tensors are left over")
        except (ValueError, RecursionError) as error:
            raise FedsplitError(
                f"boundary layout={self.layout[:200]!r}: does not describe {len(self.tensors)} "
                f"tensors ({error})"
            ) from None
        return found

    @property
    def where(self) -> Tensor | None:
        """The tokens that hold something, ``[batch, tokens]``; None if all do."""
        return next((one for one in self.kept if one is not None), None)

    def leaf(self) -> "Boundary":
        """Return the same values cut off from any graph; floating tensors collect gradients."""
        leaves = (
            tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in self.tensors
        )
        return replace(self, tensors=tuple(leaves))

    def detach(self) -> "Boundary":
        """Return the same values cut off from any graph, without gradients."""
        return replace(self, tensors=tuple(tensor.detach() for tensor in self.tensors))

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradient that each tensor of a `leaf` boundary has collected."""
        return tuple(tensor.grad for tensor in self.tensors)

    def backward(self, gradients: Sequence[Tensor | None]) -> None:
        """Send `gradients` back through the graph that made these tensors.

        Tensors outside any graph (a segment with nothing to train) are passed over.

        Raises
        ------
        FedsplitError
            If the number or a shape of the gradients is not that of the tensors.
        """
        if len(gradients) != len(self.tensors):
            raise FedsplitError(
                f"gradients={len(gradients)}: must be one for each of {len(self.tensors)} tensors"
            )
        pairs = []
        for tensor, gradient in zip(self.tensors, gradients, strict=True):
            if gradient is None or not tensor.requires_grad:
                continue
            if gradient.shape != tensor.shape:
                raise FedsplitError(
                    f"gradient shape={tuple(gradient.shape)}: must be {tuple(tensor.shape)}, "
                    "the shape of its boundary tensor"
                )
            pairs.append((tensor, gradient))
        if pairs:
            torch.autograd.backward([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def _describe(value: Any, tensors: list[Tensor]) -> Any:
    """Return the layout of `value`, and add its tensors to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _TENSOR
    if type(value) in _NAMES:
        return [_NAMES[type(value)], *(_describe(item, tensors) for item in value)]
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {key: _describe(item, tensors) for key, item in value.items()}
    if type(value) is dict and all(type(key) is int for key in value):
        return [_NUMBERED, list(value), *(_describe(item, tensors) for item in value.values())]
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
        raise FedsplitError(
            f"boundary={type(value).__name__}: must hold its tensors in lists, tuples or dicts "
            "with keys of text or whole numbers, to cross a cut"
        )
    return _ABSENT


class _Builder:
    """Builds what a layout from elsewhere describes, of containers that are listed here only."""

    def __init__(self, tensors: Iterator[Tensor]) -> None:
        self._tensors = tensors
        self._nodes = 0

    def build(self, node: Any, depth: int = 0) -> Any:
        """Return what `node` stands for; raise ValueError if it is none."""
        self._nodes += 1
        if depth > _DEPTH or self._nodes > _NODES:
            raise ValueError(f"at most {_DEPTH} levels and {_NODES} nodes")
        if type(node) is dict:
            return {key: self.build(item, depth + 1) for key, item in node.items()}
        if type(node) is list and node and type(node[0]) is str and node[0] in _SEQUENCES:
            return _SEQUENCES[node[0]](self.build(item, depth + 1) for item in node[1:])
        if type(node) is list and len(node) > 1 and node[0] == _NUMBERED:
            return self._numbered(node[1], node[2:], depth)
        if type(node) is not int or node not in (_ABSENT, _TENSOR):
            raise ValueError("a node must be 0, 1, a list, a tuple or a dict")
        if node == _ABSENT:
            return None
        tensor = next(self._tensors, None)
        if tensor is None:
            raise ValueError("some tensors are missing")
        return tensor

    def _numbered(self, keys: Any, items: list[Any], depth: int) -> dict[int, Any]:
        if type(keys) is not list or any(type(key) is not int for key in keys):
            raise ValueError("keys must be whole numbers")
        if len(set(keys)) != len(keys) or len(keys) != len(items):
            raise ValueError("keys must be one for each item")
        return {key: self.build(item, depth + 1) for key, item in zip(keys, items, strict=True)}


def spread(rows: Tensor, where: Tensor) -> Tensor:
    """Return ``[*where.shape, ...]`` with `rows` where that is true, and zeros elsewhere."""
    whole = rows.new_zeros((*where.shape, *rows.shape[1:]))
    whole[where] = rows
    return whole


@dataclass(frozen=True)
class Output:
    """The result of a route's last segment.

    Parameters
    ----------
    loss : Tensor
        Mean loss over `n_targets`, as the model computes it; scalar.
    n_targets : int
        Tokens (or images) that the loss is a mean over.
    logits : Tensor or None
        Scores, shape ``[batch, tokens, vocabulary]`` or ``[batch, labels]``.
    """

    loss: Tensor
    n_targets: int
    logits: Tensor | None
