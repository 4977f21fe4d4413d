"""Codecs that keep every element: identity, narrower floats, eight bits with a scale per token."""

from collections.abc import Sequence

import torch
import zstandard

from fedsplit.codec.base import Codec, Payload, bounded, corrupt, from_raw, raw_bytes, saturate
from fedsplit.errors import FedsplitError, require_choice


class Identity(Codec):
    """Sends the tensor as it lies in memory, bit for bit and without a copy."""

    def _encode(self, tensor: torch.Tensor, samples: Sequence[int] | None) -> Payload:
        return raw_bytes(tensor)

    def _decode(
        self,
        payload: memoryview,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        samples: Sequence[int] | None,
    ) -> torch.Tensor:
        return from_raw(payload, shape, dtype)


class Cast(Codec):
    """Sends a narrower float. NaN and infinity survive; finite values saturate, never overflow."""

    def __init__(self, wire: torch.dtype) -> None:
        self._wire = wire

    def _encode(self, tensor: torch.Tensor, samples: Sequence[int] | None) -> Payload:
        return raw_bytes(saturate(tensor, self._wire))

    def _decode(
        self,
        payload: memoryview,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        samples: Sequence[int] | None,
    ) -> torch.Tensor:
        return saturate(from_raw(payload, shape, self._wire), dtype)


class Scaled(Codec):
    """Sends eight bits per element and one fp32 scale per token (row of the last dimension).

    Each row is divided by its scale, so that its largest magnitude takes the largest number of
    the eight-bit type. NaN and infinity are refused.

    Parameters
    ----------
    wire : dtype
        ``torch.int8``, or the eight-bit float ``torch.float8_e4m3fn``.
    lossless : {"none", "zstd"}
        What the eight bits are squeezed with.
    """

    def __init__(self, wire: torch.dtype, *, lossless: str = "none") -> None:
        require_choice("codec.lossless", lossless, ("none", "zstd"))
        self._wire = wire
        self._squeeze = lossless == "zstd"
        self._largest = 127.0 if wire == torch.int8 else torch.finfo(wire).max

    def _encode(self, tensor: torch.Tensor, samples: Sequence[int] | None) -> Payload:
        rows = as_rows(tensor)
        scale = finite_amax(rows) / self._largest
        scaled = rows / torch.where(scale > 0, scale, 1.0)
        scaled.clamp_(-self._largest, self._largest)
        narrow = (scaled.round_() if self._wire == torch.int8 else scaled).to(self._wire)
        payload = b"".join((raw_bytes(scale), raw_bytes(narrow)))
        return zstandard.compress(payload, 1) if self._squeeze else payload

    def _decode(
        self,
        payload: memoryview,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        samples: Sequence[int] | None,
    ) -> torch.Tensor:
        n_rows, width = row_shape(shape)
        size = n_rows * (4 + width)
        octets = unsqueeze(payload, size) if self._squeeze else payload
        if len(octets) != size:
            raise corrupt(f"{len(octets)} bytes, but {shape} takes {size}")
        scale = from_raw(octets[: 4 * n_rows], (n_rows, 1), torch.float32)
        if not scale.isfinite().all():
            raise corrupt("a scale that is not finite")
        narrow = from_raw(octets[4 * n_rows :], (n_rows, width), self._wire)
        return saturate(bounded(narrow.to(torch.float32) * scale), dtype).reshape(shape)


def row_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return how many tokens a tensor of `shape` has, and the elements of each."""
    width = shape[-1] if len(shape) > 0 else 1
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, width


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` as float32 [tokens, elements of a token]."""
    return tensor.reshape(row_shape(tensor.shape)).to(torch.float32)


def finite_amax(rows: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each row, [rows, 1].

    Raises
    ------
    FedsplitError
        If an element is NaN or infinite.
    """
    largest = rows.abs().amax(dim=1, keepdim=True)
    if not largest.isfinite().all():
        raise FedsplitError("tensor holds NaN or infinity, which this codec cannot represent")
    return largest


def unsqueeze(payload: memoryview, size: int) -> memoryview:
    """Undo zstd on a frame of exactly `size` bytes, allocating no more than that.

    Raises
    ------
    FedsplitError
        If the frame is damaged or announces another size.
    """
    try:
        announced = zstandard.frame_content_size(payload)
        if announced != size:
            raise corrupt(f"a zstd frame of {announced} bytes where {size} are due")
        octets = zstandard.ZstdDecompressor().decompress(payload, max_output_size=size)
    except zstandard.ZstdError as error:
        raise corrupt(str(error)) from error
    return memoryview(octets)
