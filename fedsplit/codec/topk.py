"""The SFT pipeline: keep the largest magnitudes, quantise them, code both without loss."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedsplit.codec import checks
from fedsplit.codec.base import Codec, Payload, corrupt, saturate
from fedsplit.codec.dense import as_rows, finite_amax, row_shape
from fedsplit.codec.entropy import Gaps, Stack, Symbols, normalise, weigh
from fedsplit.codec.quantise import ROUNDINGS, Grid
from fedsplit.codec.sparsify import kept_positions
from fedsplit.errors import require_choice

_HEADER = struct.Struct("<IIff")
_SCALE_HEADER = struct.Struct("<hB")
_PER_OCTAVE = 4
_SMALLEST = -126 * _PER_OCTAVE  # the smallest normal float32, so that no scale is zero
_SCOPES = ("tensor", "token")


@dataclass(frozen=True)
class Scales:
    """One power of 2^(1/4) per token: ``2 ** ((origin + codes) / 4)``."""

    codes: Symbols
    origin: int

    @classmethod
    def fit(cls, largest: torch.Tensor) -> "Scales":
        """Return the smallest such powers that are not below `largest` [tokens, 1]."""
        steps = torch.ceil(_PER_OCTAVE * torch.log2(largest.cpu().reshape(-1)))
        floor = max(steps.max().item() - 255, _SMALLEST)
        codes = steps.clamp(min=floor).to(torch.int32)
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


class TopK(Codec):
    """Top-k by magnitude, b-bit stochastic quantiser, entropy-coded positions and levels.

    Parameters
    ----------
    keep : float
        Fraction of elements kept, in (0, 1].
    per : {"tensor", "token"}
        Where the largest are looked for: in the whole tensor (SFT) or in each token.
    bits : int
        2 to 8: a sign and 2^(bits-1) magnitudes.
    rounding : {"unbiased", "author", "nearest"}
        See `Grid.levels`.
    clip_percentile : float
        Percentile of kept magnitudes above which they are clipped; SFT: 95. Values that are
        clipped are biased whatever the rounding.
    scale : {"tensor", "token"}
        Whether tokens are brought to a common magnitude before selection and quantisation. For
        boundaries where a few tokens are far larger than the rest; costs half a byte per token.

    Notes
    -----
    NaN and infinity are refused. With token scales, a token 64 octaves below the largest becomes
    zero.
    """

    def __init__(
        self,
        *,
        keep: float = 0.1,
        per: str = "tensor",
        bits: int = 4,
        rounding: str = "unbiased",
        clip_percentile: float = 100.0,
        scale: str = "tensor",
        seed: int = 0,
    ) -> None:
        self._keep = checks.number("keep", keep, 1e-6, 1.0)
        self._bits = checks.integer("bits", bits, 2, 8)
        self._clip = checks.number("clip_percentile", clip_percentile, 1.0, 100.0)
        require_choice("codec.per", per, _SCOPES)
        require_choice("codec.scale", scale, _SCOPES)
        require_choice("codec.rounding", rounding, ROUNDINGS)
        self._per_token, self._scaled, self._rounding = per == "token", scale == "token", rounding
        self._seed = seed
        self._generator: torch.Generator | None = None

    def quantise(self, tensor: torch.Tensor) -> Quantised:
        """Return the lossy part of the pipeline, computed on the tensor's device.

        Raises
        ------
        FedsplitError
            If an element is NaN or infinite.
        """
        rows = as_rows(tensor)
        largest = finite_amax(rows)
        scales = Scales.fit(largest) if self._scaled else None
        if scales is not None:
            rows = rows / scales.values().to(rows.device)
        positions = kept_positions(rows, self._keep, self._per_token)
        values = rows.reshape(-1).index_select(0, positions)
        magnitude = values.abs()
        grid = Grid.fit(magnitude, self._bits, self._clip)
        levels = grid.levels(magnitude, self._rounding, self._noise(magnitude))
        symbols = (levels * 2).add_(values < 0)
        return Quantised(positions.cpu().numpy(), symbols.cpu().numpy(), grid, scales)

    def _encode(self, tensor: torch.Tensor, samples: Sequence[int] | None) -> Payload:
        return _pack(self.quantise(tensor), tensor.numel())

    def _decode(
        self,
        payload: memoryview,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        samples: Sequence[int] | None,
    ) -> torch.Tensor:
        n_rows, width = row_shape(shape)
        kept = _unpack(payload, n_rows, width, self._bits, self._scaled)
        symbols = torch.from_numpy(kept.symbols)
        values = kept.grid.magnitudes(symbols >> 1)
        values.mul_(1 - 2 * (symbols & 1))
        rows = torch.zeros(n_rows, width, dtype=torch.float32)
        rows.reshape(-1)[torch.from_numpy(kept.positions)] = values
        if kept.scales is not None:
            rows *= kept.scales.values()
        return saturate(rows, dtype).reshape(shape)

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        if self._rounding == "nearest":
            return like
        if self._generator is None or self._generator.device != like.device:
            self._generator = torch.Generator(like.device).manual_seed(self._seed)
        return torch.rand(like.shape, generator=self._generator, device=like.device)


def _pack(kept: Quantised, n: int) -> bytes:
    """Return the bytes of the kept ones of `n` elements."""
    stack = Stack()
    scale_header = b""
    if kept.scales is not None:
        codes = kept.scales.codes
        last = int(codes.max())
        weights = weigh(codes, last + 1)
        stack.push(codes, _padded(weights))
        scale_header = _SCALE_HEADER.pack(kept.scales.origin, last) + weights.tobytes()
    weights = weigh(kept.symbols, 2 * kept.grid.n_levels)
    stack.push(kept.symbols, normalise(weights))
    gaps = Gaps(len(kept.positions), n)
    gap_symbols = gaps.symbols(kept.positions)
    stack.push(gap_symbols, gaps.probabilities)
    header = _HEADER.pack(len(kept.symbols), len(gap_symbols), kept.grid.low, kept.grid.high)
    return b"".join((header, weights.tobytes(), scale_header, stack.to_bytes()))


def _unpack(payload: memoryview, n_rows: int, width: int, bits: int, scaled: bool) -> Quantised:
    """Undo `_pack`, taking no more memory than the tensor does."""
    n = n_rows * width
    reader = _Reader(payload)
    n_kept, n_gaps, low, high = _HEADER.unpack(reader.take(_HEADER.size))
    if not (1 <= n_kept <= n_gaps <= n and 0 <= low <= high < float("inf")):
        raise corrupt("counts or range of values do not fit the tensor")
    weights = reader.weights(1 << bits)
    if scaled:
        origin, last = _SCALE_HEADER.unpack(reader.take(_SCALE_HEADER.size))
        scale_weights = reader.weights(last + 1)

    stack = Stack.from_bytes(reader.rest())
    gaps = Gaps(n_kept, n)
    positions = gaps.positions(stack.pop(n_gaps, gaps.probabilities))
    if len(positions) != n_kept or positions[-1] >= n:
        raise corrupt("positions do not fit the tensor")
    symbols = stack.pop(n_kept, normalise(weights))
    scales = Scales(stack.pop(n_rows, _padded(scale_weights)), origin) if scaled else None
    stack.close()
    return Quantised(positions, symbols, Grid(low, high, 1 << (bits - 1)), scales)


def _padded(weights: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return probabilities with one symbol more, because the coder wants two at least."""
    return normalise(np.append(weights, np.uint8(0)))


class _Reader:
    """Takes bytes off the front of a payload."""

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload

    def take(self, n: int) -> memoryview:
        if n > len(self._payload):
            raise corrupt("payload is cut short")
        head, self._payload = self._payload[:n], self._payload[n:]
        return head

    def weights(self, n: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.take(n), dtype=np.uint8)

    def rest(self) -> memoryview:
        return self._payload
