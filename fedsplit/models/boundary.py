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
    def pack(cls, values: Any) -> "Boundary":
        """Return the boundary that carries a pytree's tensors; its other leaves become None."""
        leaves, spec = tree_flatten(values)
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        filled = [isinstance(leaf, Tensor) for leaf in leaves]
        tree = json.loads(treespec_dumps(spec))
        return cls(tensors, json.dumps({"tree": tree, "filled": filled}, separators=(",", ":")))

    def unpack(self) -> Any:
        """Return the pytree that was packed.

        Raises
        ------
        FedsplitError
            If the layout does not describe these tensors.
        """
        try:
            layout = json.loads(self.layout)
            tensors = iter(self.tensors)
            leaves = [next(tensors) if filled else None for filled in layout["filled"]]
            if next(tensors, None) is not None:
                raise ValueError("some tensors are left over")
            return tree_unflatten(leaves, treespec_loads(json.dumps(layout["tree"])))
        except (ValueError, LookupError, TypeError, StopIteration, NotImplementedError) as error:
            raise FedsplitError(
                f"boundary layout={self.layout[:200]!r}: does not describe {len(self.tensors)} "
                f"tensors ({error!r})"
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
