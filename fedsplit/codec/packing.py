"""The lossless part of the SFT pipeline: positions, levels and scales to bytes and back."""

import struct
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from fedsplit.codec.base import corrupt
from fedsplit.codec.entropy import Gaps, Stack, Symbols, normalise, weigh
from fedsplit.codec.quantise import Grid

_GRID = struct.Struct("<ff")
_COUNTS = struct.Struct("<II")
_ORIGIN = struct.Struct("<h")
_PER_OCTAVE = 4
_SMALLEST = -126 * _PER_OCTAVE  # the smallest normal float32, so that no scale is zero
_LARGEST = 128 * _PER_OCTAVE - 1  # the largest that float32 holds, so that none is infinite


@dataclass(frozen=True)
class Scales:
    """One power of 2^(1/4) per token: ``2 ** ((origin + codes) / 4)``."""

    codes: Symbols
    origin: int

    @classmethod
    def fit(cls, largest: torch.Tensor) -> "Scales":
        """Return the smallest such powers that are not below `largest` [tokens, 1].

        Near the end of float32 they may be below it, by less than a step.
        """
        steps = torch.ceil(_PER_OCTAVE * torch.log2(largest.cpu().reshape(-1)))
        floor = max(min(steps.max().item(), _LARGEST) - 255, _SMALLEST)
        codes = steps.clamp(min=floor, max=_LARGEST).to(torch.int32)
        origin = int(codes.min())
        return cls((codes - origin).numpy(), origin)

    def values(self) -> torch.Tensor:
        """Return the scales, float32 [tokens, 1]."""
        steps = torch.from_numpy(self.codes).to(torch.float64) + self.origin
        return torch.exp2(steps / _PER_OCTAVE).to(torch.float32).reshape(-1, 1)


@dataclass(frozen=True)
class Quantised:
    """What the lossy part leaves of a tensor, and all that the lossless part codes.

    Parameters
    ----------
    positions : int64 [kept]
        Flat positions of the kept elements, ascending.
    symbols : int32 [kept]
        Twice the magnitude's level on `grid`, plus one if the element is negative.
    grid : Grid
        The magnitudes, before `scales`.
    scales : Scales or None
        What tokens were divided by.
    """

    positions: NDArray[np.int64]
    symbols: Symbols
    grid: Grid
    scales: Scales | None


def pack(kept: Quantised, n_rows: int, width: int, by_column: bool) -> bytes:
    """Return the bytes of what is kept of a tensor [n_rows, width].

    With `by_column`, columns are put in classes of like density (half an octave each), and each
    class is coded with its own density and histogram of levels.
    """
    stack = Stack()
    headers: list[bytes] = []
    if kept.scales is not None:
        headers.append(_ORIGIN.pack(kept.scales.origin) + _push(stack, kept.scales.codes))
    positions, symbols = kept.positions, kept.symbols
    classes = np.ones(width, dtype=np.int32)
    if by_column:
        rows, columns = np.divmod(positions, width)
        classes = _density_classes(np.bincount(columns, minlength=width), n_rows)
        places = _ranks(classes)[columns] * n_rows + rows
        order = np.argsort(places)
        positions, symbols = places[order], symbols[order]

    for start, stop in reversed(_segments(classes, n_rows)):
        first, last = np.searchsorted(positions, (start, stop))
        level_header = _push(stack, symbols[first:last])
        gaps = Gaps(int(last - first), stop - start)
        gap_symbols = gaps.symbols(positions[first:last] - start)
        stack.push(gap_symbols, gaps.probabilities)
        headers.append(_COUNTS.pack(last - first, len(gap_symbols)) + level_header)
    if by_column:
        headers.append(_push(stack, classes))
    headers.append(_GRID.pack(kept.grid.low, kept.grid.high))
    return b"".join((*reversed(headers), stack.to_bytes()))


def unpack(
    payload: memoryview, n_rows: int, width: int, *, bits: int, scaled: bool, by_column: bool
) -> Quantised:
    """Undo `pack`, taking no more memory than the tensor does.

    Raises
    ------
    FedsplitError
        If `payload` cannot be what `pack` made.
    """
    reader = _Reader(payload)
    low, high = _GRID.unpack(reader.take(_GRID.size))
    if not 0 <= low <= high < float("inf"):
        raise corrupt("values out of range")
    classes = np.ones(width, dtype=np.int32)
    if by_column:
        class_weights = reader.weights()
        n_segments = int(np.count_nonzero(class_weights[1:]))
    else:
        n_segments = 1
    segments = [
        (_COUNTS.unpack(reader.take(_COUNTS.size)), reader.weights()) for _ in range(n_segments)
    ]
    if scaled:
        (origin,) = _ORIGIN.unpack(reader.take(_ORIGIN.size))
        scale_weights = reader.weights()

    stack = Stack.from_bytes(reader.rest())
    if by_column:
        classes = stack.pop(width, normalise(class_weights))
    bounds = _segments(classes, n_rows)
    if len(bounds) != n_segments:
        raise corrupt("classes do not fit the tensor")
    parts = [
        _pop_segment(stack, counts, weights, *bound)
        for (counts, weights), bound in zip(segments, bounds, strict=True)
    ]
    positions = np.concatenate([part for part, _ in parts])
    symbols = np.concatenate([part for _, part in parts])
    if by_column:
        places, rows = np.divmod(positions, n_rows)
        positions = rows * width + np.argsort(_ranks(classes))[places]
    if symbols.max() >> bits:
        raise corrupt("a level beyond the largest")
    scales = Scales(stack.pop(n_rows, normalise(scale_weights)), origin) if scaled else None
    stack.close()
    return Quantised(positions, symbols, Grid(low, high, 1 << (bits - 1)), scales)


def _push(stack: Stack, symbols: Symbols) -> bytes:
    """Push `symbols` and return the header with which `_Reader.weights` gets their histogram."""
    weights = weigh(symbols, max(int(symbols.max()) + 1, 2))  # the coder wants two at least
    stack.push(symbols, normalise(weights))
    return bytes([len(weights) - 1]) + weights.tobytes()


def _pop_segment(
    stack: Stack, counts: tuple[int, int], weights: NDArray[np.uint8], start: int, stop: int
) -> tuple[NDArray[np.int64], Symbols]:
    """Return the positions, from `start` on, and symbols of one class."""
    n_kept, n_gaps = counts
    if not 1 <= n_kept <= n_gaps <= stop - start:
        raise corrupt("counts do not fit the tensor")
    gaps = Gaps(n_kept, stop - start)
    positions = gaps.positions(stack.pop(n_gaps, gaps.probabilities)) + start
    if len(positions) != n_kept or positions[-1] >= stop:
        raise corrupt("positions do not fit the tensor")
    return positions, stack.pop(n_kept, normalise(weights))


def _density_classes(counts: NDArray[np.int64], n_rows: int) -> Symbols:
    """Return 0 for empty columns, else 1 for full ones and more by halves of an octave."""
    octaves = np.log2(n_rows / np.maximum(counts, 1))
    return np.where(counts > 0, 1 + np.round(2 * octaves), 0).astype(np.int32)


def _ranks(classes: Symbols) -> NDArray[np.int64]:
    """Return where each column stands when they are sorted by class."""
    ranks = np.empty(len(classes), dtype=np.int64)
    ranks[np.argsort(classes, kind="stable")] = np.arange(len(classes))
    return ranks


def _segments(classes: Symbols, n_rows: int) -> list[tuple[int, int]]:
    """Return the bounds of each class in the sorted columns laid end to end; class 0 has none."""
    ends = np.cumsum(np.bincount(classes)) * n_rows
    return [(int(a), int(b)) for a, b in pairwise(ends) if b > a]


class _Reader:
    """Takes bytes off the front of a payload."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload

    def take(self, n: int) -> memoryview:
        if n > len(self._payload):
            raise corrupt("payload is cut short")
        head, self._payload = self._payload[:n], self._payload[n:]
        return head

    def weights(self) -> NDArray[np.uint8]:
        (last,) = self.take(1)
        weights = np.frombuffer(self.take(last + 1), dtype=np.uint8)
        if len(weights) < 2 or not weights.any():
            raise corrupt("a histogram without counts")
        return weights

    def rest(self) -> memoryview:
        return self._payload
