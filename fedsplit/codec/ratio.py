"""How much codecs are expected to compress a model's boundaries, before anything is trained."""

import json
import math
from collections.abc import Callable, Mapping
from functools import cache

import torch

from fedsplit.codec.registry import make_codec
from fedsplit.profiles import ModelProfile

# More elements than these do not change the ratio, but take time and memory.
_ENOUGH_ELEMENTS = 1 << 22


def gaussian_ratio(
    profile: ModelProfile, batch: int = 4, seed: int = 0
) -> Callable[[Mapping[str, object]], float]:
    """Return the compression that codecs reach on Gaussian boundaries of the model.

    An estimate for plans: the bytes of a run depend on its data. Codecs that learn from earlier
    batches, or from earlier turns, are estimated at their first one: later ones take less.

    Parameters
    ----------
    profile : ModelProfile
        Its `crossing` has the shape and element type of the boundaries.
    batch : int
        Samples of a mini-batch.
    seed : int
        Seed of the boundary and of the codecs.

    Returns
    -------
    callable
        ``ratio(settings)``: encoded over raw bytes, both at the width that the boundary has.
    """
    form = profile.crossing.boundary
    shape = form.shape
    if not shape:
        elements = profile.embed.boundary_bytes / form.itemsize
        shape = (profile.seq_len, max(int(elements / profile.seq_len), 1))
    samples = max(min(batch, _ENOUGH_ELEMENTS // math.prod(shape)), 1)
    draw = torch.Generator().manual_seed(seed)
    sample = torch.randn((samples, *shape), generator=draw).to(getattr(torch, form.dtype))

    @cache
    def measured(text: str) -> float:
        payload = make_codec(json.loads(text), seed).encode(sample, samples=tuple(range(samples)))
        return len(payload) / sample.nbytes

    def ratio(settings: Mapping[str, object]) -> float:
        return measured(json.dumps(dict(settings), sort_keys=True))

    return ratio
