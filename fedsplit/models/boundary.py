"""What crosses a cut, and what the end of a route gives back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from fedsplit.errors import FedsplitError


@dataclass(frozen=True)
class Boundary:
    """The tensors that a block hands to the next one, where a route is cut.

    Parameters
    ----------
    tensors : tuple of Tensor
        The tensors that matter to what follows, usually one of shape ``[batch, tokens, hidden]``.
    layout : str
        JSON text that says how the block returned them (a bare tensor, a tuple, ...).
    """

    tensors: tuple[Tensor, ...]
    layout: str

    @classmethod
    def pack(cls, output: Any, kept: frozenset[int] | None = None) -> "Boundary":
        """Return the boundary made of what a block returned.

        Parameters
        ----------
        output : pytree
            What the block returned.
        kept : frozenset of int or None
            Leaves of the pytree that later blocks read; other tensors are left behind, and arrive
            as None. None keeps all.
        """
        leaves, spec = tree_flatten(output)
        tensors: list[Tensor] = []
        slots: list[int | None] = []
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and (kept is None or position in kept):
                slots.append(len(tensors))
                tensors.append(leaf)
            else:
                slots.append(None)
        return cls(
            tuple(tensors), json.dumps({"tree": json.loads(treespec_dumps(spec)), "slots": slots})
        )

    def unpack(self) -> Any:
        """Return what the block returned, with None for leaves that did not travel.

        Raises
        ------
        FedsplitError
            If the layout does not describe these tensors.
        """
        try:
            layout = json.loads(self.layout)
            slots = [None if slot is None else int(slot) for slot in layout["slots"]]
            if sorted(slot for slot in slots if slot is not None) != list(range(len(self.tensors))):
                raise ValueError("its slots do not match the tensors")
            leaves = [None if slot is None else self.tensors[slot] for slot in slots]
            return tree_unflatten(leaves, treespec_loads(json.dumps(layout["tree"])))
        except (ValueError, KeyError, TypeError, IndexError, NotImplementedError) as error:
            raise FedsplitError(
                f"boundary layout={self.layout[:200]!r}: does not describe {len(self.tensors)} "
                f"tensors ({error})"
            ) from error

    def leaf(self) -> "Boundary":
        """Return the same values cut off from any graph; floating tensors collect gradients."""
        return Boundary(
            tuple(
                tensor.detach().requires_grad_(tensor.is_floating_point())
                for tensor in self.tensors
            ),
            self.layout,
        )

    def detach(self) -> "Boundary":
        """Return the same values cut off from any graph, without gradients."""
        return Boundary(tuple(tensor.detach() for tensor in self.tensors), self.layout)

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
