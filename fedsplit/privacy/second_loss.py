"""Training a device's part to say less of its data: what a second loss beside the task's is.

NoPeek: Vepakomma et al., "NoPeek: Information leakage reduction to share activations in
distributed deep learning", 2020. Distance correlation: Szekely, Rizzo and Bakirov, "Measuring and
testing dependence by correlation of distances", 2007, definitions 3 and 4. The reader's probability
of being right is what Goldberger et al., "Neighbourhood components analysis", NIPS 2004, maximise.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.models import Boundary

_TINY = 1e-12
_NEARBY = 0.05  # of the mean squared distance


def distance_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return the squared distance correlation of two sets of distances, from 0 to 1.

    Parameters
    ----------
    first, second : Tensor
        Distances between the same n items, ``[n, n]``.
    """
    one, other = _centred(first), _centred(second)
    spread = (one.square().mean() * other.square().mean()).clamp_min(_TINY).sqrt()
    return (one * other).mean() / spread


def read_by_neighbours(vectors: Tensor, tokens: Tensor) -> Tensor:
    """Return the share of tokens that one who knows all others of a mini-batch reads, about.

    For each position it draws another, nearby ones more likely than far ones, and says its token.
    It needs no training, so it is always as good as it can be against what is sent now.

    Parameters
    ----------
    vectors : Tensor
        ``[positions, width]``.
    tokens : Tensor
        Int64, ``[positions]``.
    """
    apart = _distances(vectors).square()
    others = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    near = -apart / (_NEARBY * apart[others].mean().clamp_min(_TINY))
    chance = near.masked_fill(~others, -torch.inf).softmax(1)
    return (chance * (tokens[:, None] == tokens[None, :])).sum(1).mean()


def less_telling(
    boundary: Boundary, inputs: Mapping[str, Tensor], *, correlation: float, reader: float
) -> tuple[Tensor, ...]:
    """Return a boundary's tensors as they are; what goes back through them has a second loss.

    It is `correlation` times the squared distance correlation between the first tensor and the data
    that it was made of: tokens, position by position, of which any two are equally far apart, or
    images. And `reader` times what can be read of the tokens (`read_by_neighbours`).

    Raises
    ------
    FedsplitError
        If the boundary has no vector for each token, or for each image, or is read of images.
    """
    first, *others = boundary.tensors
    if not first.requires_grad:
        return boundary.tensors
    pictures, ids = inputs.get("pixel_values"), inputs.get("input_ids")
    if pictures is not None:
        if reader:
            raise FedsplitError(f"privacy.reader_weight={reader}: must be 0, images have no tokens")
        seen = torch.ones(len(pictures), dtype=torch.bool)
        tokens, distances = torch.zeros(0), _distances(pictures.flatten(1).float())
    else:
        assert ids is not None
        seen = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        tokens = ids[seen]
        distances = (tokens[:, None] != tokens[None, :]).float()
    if first.shape[: seen.dim()] != seen.shape or first.dim() == seen.dim():
        name, weight = ("correlation", correlation) if correlation else ("reader", reader)
        raise FedsplitError(
            f"privacy.{name}_weight={weight}: a boundary of shape {tuple(first.shape)} has "
            "no vector for each token or image"
        )
    seen, tokens, distances = (item.to(first.device) for item in (seen, tokens, distances))

    def loss(tensor: Tensor) -> Tensor:
        items = tensor[seen].flatten(1)
        found = items.new_zeros(())
        if correlation:
            found = found + correlation * distance_correlation(distances, _distances(items))
        if reader:
            found = found + reader * read_by_neighbours(items, tokens)
        return found

    joined = _SecondLoss.apply(first, loss)  # type: ignore[no-untyped-call]
    return (joined, *others)


def _centred(distances: Tensor) -> Tensor:
    return (
        distances
        - distances.mean(0, keepdim=True)
        - distances.mean(1, keepdim=True)
        + distances.mean()
    )


def _distances(vectors: Tensor) -> Tensor:
    return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")


class _SecondLoss(torch.autograd.Function):
    """The identity; its gradient is that of a sum with a loss of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(tensor)
        ctx.loss = loss
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (tensor,) = ctx.saved_tensors
        with torch.enable_grad():
            own = tensor.detach().float().requires_grad_()
            (more,) = torch.autograd.grad(ctx.loss(own), own)
        return gradients[0] + more.to(gradients[0].dtype), None
