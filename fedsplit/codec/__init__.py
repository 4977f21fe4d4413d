"""Compress boundaries and their gradients into the bytes that cross the link."""

from fedsplit.codec.base import Codec, Payload
from fedsplit.codec.loopback import Loopback, straight_through
from fedsplit.codec.memory import Entry, Remembered
from fedsplit.codec.ratio import gaussian_ratio
from fedsplit.codec.registry import CODECS, make_codec

__all__ = [
    "CODECS",
    "Codec",
    "Entry",
    "Loopback",
    "Payload",
    "Remembered",
    "gaussian_ratio",
    "make_codec",
    "straight_through",
]
