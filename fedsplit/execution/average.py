"""Averaging adapters, wherever that is done: at an edge or at the server."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsplit.errors import FedsplitError, require
from fedsplit.execution.lane import compute


def weighted_mean(
    sets: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return the weighted mean of adapter sets, summed in double precision and rounded once.

    Parameters
    ----------
    sets : sequence of mapping of str to Tensor
        At least one; all of the same names and shapes. A single one comes back as it is.
    weights : sequence of float
        One for each set, positive.

    Raises
    ------
    FedsplitError
        If there is no set, a weight is missing or not positive, or the names differ.
    """
    require(len(sets) > 0, "sets", len(sets), "at least 1")
    require(len(weights) == len(sets), "weights", len(weights), f"{len(sets)}, one a set")
    if len(sets) == 1:
        return dict(sets[0])
    require(all(weight > 0 for weight in weights), "weights", tuple(weights), "above 0")
    for other in sets[1:]:
        if other.keys() != sets[0].keys():
            odd = min(other.keys() ^ sets[0].keys())
            raise FedsplitError(f"adapter {odd!r}: must be in every set that is averaged")
    shares = [weight / sum(weights) for weight in weights]
    return compute(
        lambda: {
            name: _mean([one[name] for one in sets], shares).to(tensor.dtype)
            for name, tensor in sets[0].items()
        }
    )


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.double(), alpha=share)
    return total
