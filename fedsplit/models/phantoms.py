"""Phantoms: weights that other tiers hold, as views of a single zero."""

import torch
from torch import Tensor


def phantom(like: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return a tensor of zeros with the shape and type of `like` that takes no memory."""
    return torch.zeros((), dtype=like.dtype, device=device).expand(like.shape)


def is_phantom(tensor: Tensor) -> bool:
    """Return whether `tensor` is a view of a single element."""
    return tensor.numel() > 1 and not any(tensor.stride())
