"""Training a device's part to say less of its data: distance correlation as a second loss.

NoPeek: Vepakomma et al., "NoPeek: Information leakage reduction to share activations in
distributed deep learning", 2020. Distance correlation: Szekely, Rizzo and Bakirov, "Measuring and
testing dependence by correlation of distances", 2007, definitions 3 and 4.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.models import Boundary

_TINY = 1e-12


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


def decorrelated(
    boundary: Boundary, inputs: Mapping[str, Tensor], weight: float
) -> tuple[Tensor, ...]:
    """Return a boundary's tensors as they are; what goes back through them has a second loss.

    It is `weight` times the squared distance correlation between the first tensor and the data
    that it was made of: tokens, position by position, of which any two are equally far apart, or
    images.

    Raises
    ------
    FedsplitError
        If the boundary has no vector for each token, or for each image.
    """
    first, *others = boundary.tensors
    if not first.requires_grad:
        return boundary.tensors
    pictures, ids = inputs.get("pixel_values"), inputs.get("input_ids")
    if pictures is not None:
        seen = torch.ones(len(pictures), dtype=torch.bool)
        distances = _distances(pictures.flatten(1).float())
    else:
        assert ids is not None
        seen = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        distances = (ids[seen][:, None] != ids[seen][None, :]).float()
    if first.shape[: seen.dim()] != seen.shape or first.dim() == seen.dim():
        raise FedsplitError(
            f"privacy.correlation_weight={weight}: a boundary of shape {tuple(first.shape)} has "
            "no vector for each token or image"
        )
    place = first.device
    joined = _SecondLoss.apply(  # type: ignore[no-untyped-call]
        first, seen.to(place), distances.to(place), weight
    )
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
    def forward(ctx: Any, tensor: Tensor, seen: Tensor, distances: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(tensor, seen, distances)
        ctx.weight = weight
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tensor, seen, distances = ctx.saved_tensors
        with torch.enable_grad():
            own = tensor.detach().float().requires_grad_()
            items = own[seen].flatten(1)
            loss = ctx.weight * distance_correlation(distances, _distances(items))
            (more,) = torch.autograd.grad(loss, own)
        return gradients[0] + more.to(gradients[0].dtype), None, None, None
