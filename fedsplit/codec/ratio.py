"""The compression that plans expect of a codec."""

import json
from collections.abc import Callable, Mapping
from functools import cache

import torch

from fedsplit.codec.registry import make_codec
from fedsplit.profiles import ModelProfile


def gaussian_ratio(
    profile: ModelProfile, seed: int = 0
) -> "Callable[[Mapping[str, object]], float]":
    """Return the compression that codecs reach on Gaussian boundaries of the model's shape.

    An estimate for plans: the bytes of a run depend on its data. Codecs that learn from earlier
    batches are estimated at their first one.
    """
    width = max(int(profile.embed.boundary_bytes / 4 / profile.seq_len), 1)
    sample = torch.randn((4, profile.seq_len, width), generator=torch.Generator().manual_seed(seed))

    @cache
    def measured(text: str) -> float:
        payload = make_codec(json.loads(text), seed).encode(sample, samples=tuple(range(4)))
        return len(payload) / (sample.numel() * sample.element_size())

    def ratio(settings: Mapping[str, object]) -> float:
        return measured(json.dumps(dict(settings), sort_keys=True))

    return ratio
