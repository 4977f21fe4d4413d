"""What a codec is: a boundary tensor to bytes and back."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from fedsplit.codec.memory import SampleMemory
from fedsplit.errors import FedsplitError

Payload = bytes | bytearray | memoryview
"""The bytes of one tensor; their length is what it costs on the wire."""


class Codec(ABC):
    """Compressor of one tensor of a boundary, or of its gradient.

    A stream has one instance per direction and tensor at each end, both made by `make_codec` from
    the same settings and seed: the sender encodes, the receiver decodes, in the same order.
    Shape and dtype are known to both ends and are no part of the payload. Tensors without
    elements take no bytes, and integer or boolean ones travel unchanged through every codec.
    """

    remembers: ClassVar[bool] = False
    """Whether it remembers samples; such a codec cannot be part of another."""
    mirrored: ClassVar[bool] = False
    """Whether both ends remember the same, and must."""
    lasting: SampleMemory | None = None
    """What it remembers beyond a turn: to be restored before the first tensor of the next."""

    @property
    def working_bytes(self) -> float:
        """Memory that decoding takes at most, in bytes an element, beside payload and result."""
        return 12.0

    def encode(self, tensor: torch.Tensor, samples: Sequence[int] | None = None) -> Payload:
        """Return the bytes that stand for `tensor`.

        Parameters
        ----------
        tensor : Tensor
            Any shape, dtype and device; a non-floating dtype is sent without loss.
        samples : sequence of int, optional
            Which sample of the data set each row ``tensor[0], tensor[1], ...`` is of; needed by
            codecs that remember samples. Where padding is left out a sample has a row for each of
            its tokens, one after the other.

        Raises
        ------
        FedsplitError
            If a lossy codec that cannot represent NaN or infinity meets one.
        """
        tensor = tensor.detach()
        if tensor.numel() == 0:
            return b""
        if not tensor.is_floating_point():
            return raw_bytes(tensor)
        return self._encode(tensor, samples)

    def decode(
        self,
        payload: Payload,
        shape: Sequence[int],
        dtype: torch.dtype,
        samples: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Return the tensor of `shape` and `dtype` that `payload` stands for, on the CPU.

        The result may share memory with `payload`. Memory use is bounded by `shape`, whatever the
        payload claims.

        Raises
        ------
        FedsplitError
            If `payload` is not what `encode` makes for such a tensor.
        """
        shape = tuple(shape)
        if math.prod(shape) == 0:
            if len(payload) > 0:
                raise corrupt(f"{len(payload)} bytes for a tensor without elements")
            return torch.empty(shape, dtype=dtype)
        if not dtype.is_floating_point:
            return from_raw(payload, shape, dtype)
        return self._decode(memoryview(payload).cast("B"), shape, dtype, samples)

    @abstractmethod
    def _encode(self, tensor: torch.Tensor, samples: Sequence[int] | None) -> Payload:
        """Encode a detached floating-point tensor with at least one element."""

    @abstractmethod
    def _decode(
        self,
        payload: memoryview,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        samples: Sequence[int] | None,
    ) -> torch.Tensor:
        """Decode a floating-point tensor with at least one element."""


def corrupt(what: str) -> FedsplitError:
    """Return the error for a payload that no encoder makes."""
    return FedsplitError(f"codec payload is corrupt: {what}")


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of `tensor` as bytes, without a copy if it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def from_raw(payload: Payload, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return `payload` seen as a tensor, without a copy where NumPy and torch allow it.

    Raises
    ------
    FedsplitError
        If the length is not that of such a tensor, or a boolean is neither 0 nor 1.
    """
    expected = math.prod(shape) * dtype.itemsize
    if len(payload) != expected:
        raise corrupt(f"{len(payload)} bytes, but {tuple(shape)} {dtype} takes {expected}")
    octets: NDArray[np.uint8] = np.frombuffer(payload, dtype=np.uint8)
    if dtype == torch.bool and octets.max() > 1:
        raise corrupt("a boolean that is neither 0 nor 1")
    # DLPack, because from_numpy warns about read-only memory; the receiver of a payload is its
    # only reader, so sharing it is safe.
    try:
        flat = from_dlpack(octets)
    except BufferError:
        # NumPy below 2.1 lends no array that must not be written to, old torch takes none.
        flat = torch.from_numpy(octets.copy())
    return flat.view(dtype).reshape(tuple(shape))


def saturate(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `tensor` in `dtype`, with finite values kept finite."""
    largest = torch.finfo(dtype).max
    if largest >= torch.finfo(tensor.dtype).max:
        return tensor.to(dtype)
    low, high = (end.item() for end in torch.aminmax(tensor))
    if -largest <= low and high <= largest:  # false for NaN
        return tensor.to(dtype)
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return torch.where(wide.isinf(), wide, wide.clamp(-largest, largest)).to(dtype)


def bounded(rows: torch.Tensor) -> torch.Tensor:
    """Return `rows`, changed in place: what rounding took beyond the type's range is at its end."""
    largest = torch.finfo(rows.dtype).max
    return rows.clamp_(-largest, largest)
