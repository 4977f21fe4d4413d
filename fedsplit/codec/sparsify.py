"""Which elements of a tensor are kept: the largest magnitudes (SFT, arXiv 2501.09237)."""

import math

import numpy as np
import torch

_STRIDE = 61
"""Every 61st element is sampled: prime, so that the sample visits every channel."""


def kept_positions(rows: torch.Tensor, keep: float, per_token: bool) -> torch.Tensor:
    """Return the flat positions of the kept elements, ascending.

    The threshold is the k-th smallest magnitude with k = round((1 - keep) n), as in the authors'
    code, and everything at or above it is kept: about ``keep * n`` elements, more where
    magnitudes tie.

    Parameters
    ----------
    rows : Tensor [tokens, width]
        float32, finite.
    keep : float
        Fraction to keep, in (0, 1].
    per_token : bool
        Whether each row has its own threshold (n = width) or all share one (n = all elements).
    """
    n = rows.shape[1] if per_token else rows.numel()
    n_dropped = round((1 - keep) * n)
    if n_dropped == 0:
        return torch.arange(rows.numel(), device=rows.device)
    if per_token:
        magnitude = rows.abs()
        return _nonzero((magnitude >= _kth_smallest(magnitude, n_dropped)).reshape(-1))

    flat = rows.reshape(-1)
    n_kept = n - n_dropped + 1
    bound = _lower_bound(flat, n_kept)
    candidates = _nonzero((flat >= bound).logical_or_(flat <= -bound))
    if candidates.numel() < n_kept:
        candidates = torch.arange(n, device=flat.device)
    magnitude = flat.index_select(0, candidates).abs_()
    threshold = _kth_smallest(magnitude, magnitude.numel() - n_kept + 1)
    return candidates.index_select(0, _nonzero(magnitude >= threshold))


def _lower_bound(flat: torch.Tensor, n_kept: int) -> torch.Tensor:
    """Guess from a sample a magnitude that at least `n_kept` elements reach.

    Six standard deviations of the sample's rank below the aim, so that the guess nearly always
    holds; sorting out the few elements above it is far cheaper than sorting all.
    """
    sample = flat[::_STRIDE].abs()
    n, fraction = sample.numel(), n_kept / flat.numel()
    rank = n - math.ceil(n * fraction + 6 * math.sqrt(n * fraction * (1 - fraction)) + 1)
    return _kth_smallest(sample, rank) if rank >= 1 else sample.new_zeros(())


def _kth_smallest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k-th smallest (from 1) along the last dimension, which stays with size 1."""
    if values.device.type == "cpu":  # several times faster there than kthvalue
        return torch.from_numpy(np.partition(values.numpy(), k - 1)[..., k - 1 : k])
    return values.kthvalue(k, dim=-1, keepdim=True).values


def _nonzero(mask: torch.Tensor) -> torch.Tensor:
    """Return where a flat mask is true."""
    if mask.device.type == "cpu":  # several times faster there than nonzero
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)
