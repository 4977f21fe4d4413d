"""Codecs by name."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch

from fedsplit.codec.base import Codec
from fedsplit.codec.dense import Cast, Identity, Scaled
from fedsplit.codec.feedback import ErrorFeedback
from fedsplit.codec.low_rank import LowRank
from fedsplit.codec.temporal import Temporal
from fedsplit.codec.topk import TopK
from fedsplit.codec.transform import Transform
from fedsplit.errors import FedsplitError, require, require_choice
from fedsplit.mapping import parameters_of
from fedsplit.seeds import derive_seed

CODECS: dict[str, Callable[..., Codec]] = {
    "identity": Identity,
    "fp16": partial(Cast, torch.float16),
    "bf16": partial(Cast, torch.bfloat16),
    "fp8": partial(Scaled, torch.float8_e4m3fn),
    "int8": partial(Scaled, torch.int8),
    "topk": TopK,
    "low_rank": LowRank,
    "transform": Transform,
    "temporal": Temporal,
    "error_feedback": ErrorFeedback,
}


def make_codec(settings: Mapping[str, object], seed: int) -> Codec:
    """Return the codec that `settings` describe, as one end of a stream holds it.

    Parameters
    ----------
    settings : mapping
        ``name`` (see `CODECS`) and that codec's settings; some hold another such mapping.
    seed : int
        Seed of the stochastic rounding; only the sender draws.

    Raises
    ------
    FedsplitError
        If the name or a setting is unknown (it lists the known ones), or a value is not allowed.
    """
    options = dict(settings)
    name = options.pop("name", None)
    require_choice("codec.name", name, CODECS)
    factory = CODECS[str(name)]
    parameters = parameters_of(factory)
    known = [key for key in parameters if key != "seed"]
    for key in options:
        if key not in known:
            listed = ", ".join(known) or "none"
            raise FedsplitError(f"codec.{key}: unknown setting of codec {name!r}, known: {listed}")
    missing = [key for key in known if parameters[key].default is inspect.Parameter.empty]
    for key in missing:
        if key not in options:
            raise FedsplitError(f"codec.{key}: codec {name!r} needs this setting")
    for key, parameter in parameters.items():
        if parameter.annotation is Codec:
            options[key] = _make_part(key, options[key], derive_seed(seed, key))
    if "seed" in parameters:
        options["seed"] = seed
    return factory(**options)


def _make_part(key: str, settings: object, seed: int) -> Codec:
    """Return the codec that another one uses for a part of its work."""
    require(isinstance(settings, Mapping), f"codec.{key}", settings, "settings of a codec")
    part = make_codec(cast("Mapping[str, object]", settings), seed)
    require(not part.remembers, f"codec.{key}", settings, "a codec without memory")
    return part
