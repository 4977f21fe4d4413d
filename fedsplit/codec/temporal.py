"""Send what changed since a sample's last visit (after SplitCom, arXiv 2602.10564)."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedsplit.codec import checks
from fedsplit.codec.base import Codec, Payload, bounded, corrupt, saturate
from fedsplit.codec.memory import Entry, SampleMemory, fit
from fedsplit.errors import FedsplitError, require

_HEADER = struct.Struct("<BII")
_KEY, _SAME, _RESIDUAL = 0, 1, 2


class Temporal(Codec):
    """Sends the difference to what the receiver already has of the same sample.

    Each row ``tensor[i]`` belongs to ``samples[i]`` and is sent in one of three ways: whole (a key
    row) if it is unknown or old, as the difference to the remembered row, or not at all if it
    hardly changed. Both ends remember what the receiver decoded, so losses do not add up.
    A sample whose row has another length this time is compared over the common part.

    Parameters
    ----------
    key, residual : Codec
        What key rows and differences are sent with.
    threshold : float
        A row whose difference has at most this share of its norm is not sent.
    memory_mb : float
        Memory for remembered rows at each end, in 10^6 bytes (two bytes an element).
    key_every : int
        Visits after which a sample is sent whole again.
    over_turns : bool
        Whether a device's next turn goes on with what both ends remember of its last one.

    Notes
    -----
    A sender that starts afresh makes the receiver forget. A receiver that lost its memory while
    the sender did not raises a `FedsplitError`; both ends then need new codecs.
    """

    remembers = True
    mirrored = True

    def __init__(
        self,
        *,
        key: Codec,
        residual: Codec,
        threshold: float = 0.0,
        memory_mb: float = 256.0,
        key_every: int = 16,
        over_turns: bool = False,
    ) -> None:
        self._key, self._residual = key, residual
        self._threshold = checks.number("threshold", threshold, 0.0, 1.0)
        self._key_every = checks.integer("key_every", key_every, 1, 1_000_000)
        limit = checks.number("memory_mb", memory_mb, 0.0, 1e6) * 1e6
        self._memory = SampleMemory(int(limit))
        self.lasting = self._memory if checks.flag("over_turns", over_turns) else None

    @property
    def working_bytes(self) -> float:
        """See `Codec.working_bytes`."""
        return max(self._key.working_bytes, self._residual.working_bytes) + 24.0

    def _encode(self, tensor: torch.Tensor, samples: Sequence[int] | None) -> Payload:
        rows = _rows(tensor, samples)
        fresh = len(self._memory) == 0
        entries, references = self._recall(samples, rows.shape)
        difference = rows - references
        modes = self._choose(rows, difference, entries)
        key, residual = modes == _KEY, modes == _RESIDUAL
        key_bytes = self._key.encode(rows[key])
        residual_bytes = self._residual.encode(difference[residual])

        self._rebuild(references, modes, key_bytes, residual_bytes)
        digest = _digest(samples, entries, modes)
        self._remember(samples, references, modes, entries)
        header = _HEADER.pack(fresh, digest, len(key_bytes))
        return b"".join((header, _pack_modes(modes), key_bytes, residual_bytes))

    def _decode(
        self,
        payload: memoryview,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        samples: Sequence[int] | None,
    ) -> torch.Tensor:
        rows_shape = shape if len(shape) > 0 else (1,)
        _check_samples(rows_shape[0], samples)
        start = _HEADER.size + (rows_shape[0] + 3) // 4
        if len(payload) < start:
            raise corrupt("payload is cut short")
        fresh, digest, n_key = _HEADER.unpack(payload[: _HEADER.size])
        modes = _unpack_modes(payload[_HEADER.size : start], rows_shape[0])
        if fresh:
            self._memory.clear()
        entries, references = self._recall(samples, rows_shape)
        if _digest(samples, entries, modes) != digest:
            raise FedsplitError(
                "codec memory of the receiver does not match the sender's: both need new codecs"
            )
        body = payload[start:]
        self._rebuild(references, modes, body[:n_key], body[n_key:])
        self._remember(samples, references, modes, entries)
        return saturate(references, dtype).reshape(shape)

    def _recall(
        self, samples: Sequence[int] | None, shape: Sequence[int]
    ) -> tuple[list[Entry | None], torch.Tensor]:
        """Return what is remembered of each sample, and the rows as float32, zeros if unknown."""
        references = torch.zeros(tuple(shape), dtype=torch.float32)
        entries: list[Entry | None] = [None] * shape[0]
        for i, sample in enumerate(samples or ()):
            entry = self._memory.get(sample)
            row = fit(entry.row, shape[1:]) if entry is not None else None
            if row is not None:
                entries[i] = entry
                references[i] = row
        return entries, references

    def _choose(
        self, rows: torch.Tensor, difference: torch.Tensor, entries: list[Entry | None]
    ) -> NDArray[np.uint8]:
        n = len(entries)
        change, size = (
            torch.linalg.vector_norm(item.reshape(n, -1), dim=1, dtype=torch.float64)
            for item in (difference, rows)
        )
        same = (change <= self._threshold * size).numpy()
        known = np.array([e is not None and e.age + 1 < self._key_every for e in entries])
        return np.where(known, np.where(same, _SAME, _RESIDUAL), _KEY).astype(np.uint8)

    def _rebuild(
        self,
        references: torch.Tensor,
        modes: NDArray[np.uint8],
        key_bytes: Payload,
        residual_bytes: Payload,
    ) -> None:
        """Turn `references` into what the receiver has after this frame, in place."""
        for mode, codec, payload in (
            (_KEY, self._key, key_bytes),
            (_RESIDUAL, self._residual, residual_bytes),
        ):
            (where,) = np.nonzero(modes == mode)
            decoded = codec.decode(payload, (len(where), *references.shape[1:]), torch.float32)
            references[where] = bounded(decoded + references[where] * (mode == _RESIDUAL))

    def _remember(
        self,
        samples: Sequence[int] | None,
        rows: torch.Tensor,
        modes: NDArray[np.uint8],
        entries: list[Entry | None],
    ) -> None:
        for sample, row, mode, entry in zip(samples or (), rows, modes, entries, strict=False):
            age = 0 if mode == _KEY or entry is None else entry.age + 1
            self._memory.put(sample, row, age)


def _rows(tensor: torch.Tensor, samples: Sequence[int] | None) -> torch.Tensor:
    rows = tensor.cpu().to(torch.float32)
    rows = rows if rows.dim() > 0 else rows.reshape(1)
    _check_samples(rows.shape[0], samples)
    return rows


def _check_samples(n: int, samples: Sequence[int] | None) -> None:
    if samples is not None:
        require(len(samples) == n, "samples", tuple(samples), f"one for each of {n} rows")


def _digest(
    samples: Sequence[int] | None, entries: list[Entry | None], modes: NDArray[np.uint8]
) -> int:
    """Return a checksum of which remembered rows a frame builds on."""
    ages = [
        (sample, entry.age if entry is not None else -1)
        for sample, entry, mode in zip(samples or (), entries, modes, strict=False)
        if mode != _KEY
    ]
    return zlib.crc32(np.array(ages, dtype="<i8").tobytes())


def _pack_modes(modes: NDArray[np.uint8]) -> bytes:
    bits = np.stack((modes >> 1, modes & 1), axis=1)
    return np.packbits(bits).tobytes()


def _unpack_modes(octets: memoryview, n: int) -> NDArray[np.uint8]:
    bits = np.unpackbits(np.frombuffer(octets, dtype=np.uint8), count=2 * n).reshape(n, 2)
    modes = bits[:, 0] * 2 + bits[:, 1]
    if modes.max() > _RESIDUAL:
        raise corrupt("a row that is sent in no known way")
    return np.asarray(modes, dtype=np.uint8)
