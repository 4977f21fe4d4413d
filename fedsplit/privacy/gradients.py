"""Attacks on what goes back: labels from gradients, tokens from trained weights."""

from collections.abc import Callable

import torch
from torch import Tensor

_STEP = 1e-2


@torch.no_grad()
def labels_from_gradient(
    logits: Callable[[Tensor], Tensor], boundary: Tensor, gradient: Tensor
) -> Tensor:
    """Return the label behind each gradient that the device of a U-shaped route sends up.

    A step against the gradient of the loss raises the label's own logit more than any other. The
    server sent `boundary` itself, and knows the pretrained weights of what follows it.

    Parameters
    ----------
    logits : callable
        What follows on the device, as far as the server knows it: a boundary to scores of shape
        ``[..., labels]``.
    boundary : Tensor
        What the server sent down, ``[samples, ..., width]``.
    gradient : Tensor
        What came back, of the same shape.

    Returns
    -------
    Tensor
        Int64, of the shape of the scores without their last dimension.
    """
    length = gradient.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    step = _STEP * boundary.norm(dim=-1, keepdim=True) * gradient / length
    rise: Tensor = logits(boundary - step) - logits(boundary + step)
    return rise.argmax(-1)


def tokens_from_embeddings(before: Tensor, after: Tensor) -> Tensor:
    """Return which tokens a device has trained on, where its embeddings were trained (full).

    Only the rows of its tokens got a gradient; all others at most shrank together, by weight
    decay.

    Parameters
    ----------
    before, after : Tensor
        The embeddings handed out and handed back, ``[vocabulary, width]``.

    Returns
    -------
    Tensor
        Int64, the token ids in order.
    """
    shrunk = (after / torch.where(before == 0, 1.0, before)).median(1).values
    common = shrunk.median()
    moved = (after - common * before).abs().amax(1)
    noise = 16 * torch.finfo(after.dtype).eps * before.abs().amax()
    return (moved > noise).nonzero().flatten()
