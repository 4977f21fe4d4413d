"""Attacks on what goes back: labels from gradients, tokens from trained weights."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

_STEP = 1e-2
_CANDIDATES = 8


def labels_from_gradient(
    logits: Callable[[Tensor], Tensor], boundary: Tensor, gradient: Tensor
) -> Tensor:
    """Return the label behind each gradient that the device of a U-shaped route sends up.

    A step against the gradient raises the label's own score more than nearly all others; of the few
    that it raises most, the label is the one whose loss has the gradient that came. The server sent
    `boundary` itself, and knows the pretrained weights of what follows it.

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
    with torch.no_grad():
        rise = logits(boundary - step) - logits(boundary + step)
    candidates = rise.topk(min(_CANDIDATES, rise.shape[-1]), dim=-1).indices
    leaf = boundary.detach().requires_grad_()
    scores = logits(leaf)
    alike = []
    for labels in candidates.unbind(-1):
        loss = cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="sum")
        (caused,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        alike.append(cosine_similarity(caused, gradient, dim=-1))
    agreement = torch.stack(alike, -1)
    while agreement.dim() > candidates.dim():  # one label for many positions: an image's
        agreement = agreement.mean(1)
    chosen = agreement.argmax(-1, keepdim=True)
    return candidates.gather(-1, chosen).squeeze(-1)


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
