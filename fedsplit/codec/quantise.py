"""Stochastic quantiser of magnitudes (SFT, arXiv 2501.09237, and its authors' code)."""

import math
from dataclasses import dataclass

import torch

ROUNDINGS = ("unbiased", "author", "nearest")


@dataclass(frozen=True)
class Grid:
    """Evenly spaced magnitudes from `low` to `high`, both included."""

    low: float
    high: float
    n_levels: int

    @property
    def step(self) -> float:
        """Distance between neighbouring levels."""
        return (self.high - self.low) / (self.n_levels - 1)

    @classmethod
    def fit(cls, magnitude: torch.Tensor, bits: int, clip_percentile: float) -> "Grid":
        """Return the grid of 2^(bits-1) levels (the sign takes the other bit) for `magnitude`.

        It starts at the smallest magnitude and ends at the percentile (nearest rank) above which
        magnitudes are clipped; the authors clip above the 95th.
        """
        low = magnitude.min()
        rank = math.ceil(clip_percentile / 100 * magnitude.numel())
        high = magnitude.max() if clip_percentile == 100 else magnitude.kthvalue(max(rank, 1))[0]
        return cls(low.item(), high.item(), 1 << (bits - 1))

    def levels(self, magnitude: torch.Tensor, rounding: str, noise: torch.Tensor) -> torch.Tensor:
        """Return the level of each magnitude, int32.

        Parameters
        ----------
        magnitude : Tensor [n]
            Non-negative float32.
        rounding : {"unbiased", "author", "nearest"}
            With a fraction f inside a cell, the upper level is taken with probability f
            (unbiased), clip(2 f - 1/2, 0, 1) (the authors' code), or 1 if f >= 1/2 (nearest).
        noise : Tensor [n]
            Uniform draws from [0, 1); not looked at by nearest rounding.
        """
        if self.step == 0:
            return torch.zeros_like(magnitude, dtype=torch.int32)
        cell = (magnitude - self.low) / self.step
        if rounding == "unbiased":
            cell += noise
        elif rounding == "author":
            cell += (noise + 0.5) / 2
        else:
            cell += 0.5
        return cell.clamp_(0, self.n_levels - 1).to(torch.int32)

    def magnitudes(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the float32 magnitudes that `levels` stand for."""
        return self.low + levels.to(torch.float32) * self.step
