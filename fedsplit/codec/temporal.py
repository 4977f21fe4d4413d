"""Send what changed since a sample's last visit (after SplitCom, arXiv 2602.10564)."""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedsplit.codec import checks
from fedsplit.codec.base import Codec, Payload, bounded, corrupt, saturate
from fedsplit.codec.memory import Entry, SampleMemory, Visits, fit, visits
from fedsplit.errors import FedsplitError

_HEADER = struct.Struct("<BII")
_KEY, _SAME, _RESIDUAL = 0, 1, 2
_NOBODY = -1  # the sample of rows that nobody named; it is not remembered


class Temporal(Codec):
    """Sends the difference to what the receiver already has of the same sample.

    A sample's row ``tensor[i]``, or its rows where it has one for each token, are sent in one of
    three ways: whole if it is unknown or old, as the difference to what is remembered, or not at
    all if it hardly changed. Both ends remember what the receiver decoded, so losses do not add
    up. A sample of another length this time is compared over the common part.

    Parameters
    ----------
    key, residual : Codec
        What whole samples and differences are sent with.
    threshold : float
        A sample whose difference has at most this share of its norm is not sent.
    memory_mb : float
        Memory for remembered samples at each end, in 10^6 bytes (two bytes an element).
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
        rows = tensor.cpu().to(torch.float32).contiguous()
        rows = rows if rows.dim() > 0 else rows.reshape(1)
        owners = _owners(samples, len(rows))
        fresh = len(self._memory) == 0
        entries, references = self._recall(owners, rows.shape)
        sent, changed = visits(rows, owners), visits(rows - references, owners)
        modes = self._choose(sent, changed, entries)
        key_bytes = self._key.encode(_joined(sent, modes == _KEY))
        residual_bytes = self._residual.encode(_joined(changed, modes == _RESIDUAL))

        known = visits(references, owners)
        self._rebuild(known, modes, key_bytes, residual_bytes)
        digest = _digest(known, entries, modes)
        self._remember(known, modes, entries)
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
        if len(payload) < _HEADER.size:
            raise corrupt("payload is cut short")
        fresh, digest, n_key = _HEADER.unpack(payload[: _HEADER.size])
        if fresh:
            self._memory.clear()
        owners = _owners(samples, rows_shape[0])
        entries, references = self._recall(owners, rows_shape)
        start = _HEADER.size + (len(entries) + 3) // 4
        if len(payload) < start:
            raise corrupt("payload is cut short")
        modes = _unpack_modes(payload[_HEADER.size : start], len(entries))
        known = visits(references, owners)
        if _digest(known, entries, modes) != digest:
            raise FedsplitError(
                "codec memory of the receiver does not match the sender's: both need new codecs"
            )
        body = payload[start:]
        self._rebuild(known, modes, body[:n_key], body[n_key:])
        self._remember(known, modes, entries)
        return saturate(references, dtype).reshape(shape)

    def _recall(
        self, owners: Sequence[int], shape: Sequence[int]
    ) -> tuple[list[Entry | None], torch.Tensor]:
        """Return what is remembered of each visit, and the rows as float32, zeros if unknown."""
        references = torch.zeros(tuple(shape), dtype=torch.float32)
        entries: list[Entry | None] = []
        for sample, part in visits(references, owners):
            entry = self._memory.get(sample)
            if entry is not None:
                part.copy_(fit(entry.row, part.shape))
            entries.append(entry)
        return entries, references

    def _choose(
        self, sent: Visits, changed: Visits, entries: list[Entry | None]
    ) -> NDArray[np.uint8]:
        size, change = (
            torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for _, part in each])
            for each in (sent, changed)
        )
        same = (change <= self._threshold * size).numpy()
        known = np.array([e is not None and e.age + 1 < self._key_every for e in entries])
        return np.where(known, np.where(same, _SAME, _RESIDUAL), _KEY).astype(np.uint8)

    def _rebuild(
        self,
        known: Visits,
        modes: NDArray[np.uint8],
        key_bytes: Payload,
        residual_bytes: Payload,
    ) -> None:
        """Turn what is `known` into what the receiver has after this frame, in place."""
        width = known[0][1].shape[1]
        for mode, codec, payload in (
            (_KEY, self._key, key_bytes),
            (_RESIDUAL, self._residual, residual_bytes),
        ):
            parts = [known[place][1] for place in np.flatnonzero(modes == mode)]
            lengths = [len(part) for part in parts]
            decoded = codec.decode(payload, (sum(lengths), width), torch.float32)
            for part, came in zip(parts, torch.split(decoded, lengths), strict=True):
                part.copy_(bounded(came + part * (mode == _RESIDUAL)))

    def _remember(
        self, known: Visits, modes: NDArray[np.uint8], entries: list[Entry | None]
    ) -> None:
        for (sample, part), mode, entry in zip(known, modes, entries, strict=True):
            age = 0 if mode == _KEY or entry is None else entry.age + 1
            if sample != _NOBODY:
                self._memory.put(sample, part, age)


def _owners(samples: Sequence[int] | None, n: int) -> Sequence[int]:
    return (_NOBODY,) * n if samples is None else samples


def _joined(parts: Visits, where: NDArray[np.bool_]) -> torch.Tensor:
    """Return the positions of some visits as one tensor; without elements if there are none."""
    chosen = [parts[place][1] for place in np.flatnonzero(where)]
    return torch.cat(chosen) if chosen else torch.empty(0)


def _digest(known: Visits, entries: list[Entry | None], modes: NDArray[np.uint8]) -> int:
    """Return a checksum of which remembered rows a frame builds on."""
    ages = [
        (sample, entry.age if entry is not None else -1)
        for (sample, _), entry, mode in zip(known, entries, modes, strict=True)
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
