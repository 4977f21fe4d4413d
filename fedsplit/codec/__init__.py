"""Compress boundaries and their gradients into the bytes that cross the link."""

from fedsplit.codec.base import Codec, Payload
from fedsplit.codec.loopback import Loopback, straight_through
from fedsplit.codec.ratio import gaussian_ratio
from fedsplit.codec.registry import codec_names, make_codec

__all__ = [
    "Codec",
    "Loopback",
    "Payload",
    "codec_names",
    "gaussian_ratio",
    "make_codec",
    "straight_through",
]
