"""The SFT pipeline: keep the largest magnitudes, quantise them, code both without loss."""

import struct
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedsplit.codec import checks
from fedsplit.codec.base import Codec, Payload, corrupt
from fedsplit.codec.dense import as_rows, finite_amax, row_shape
from fedsplit.codec.entropy import Gaps, Stack, normalise, weigh
from fedsplit.codec.quantise import ROUNDINGS, Grid
from fedsplit.codec.sparsify import kept_positions
from fedsplit.errors import require_choice

_HEADER = struct.Struct("<IIff")
_SCALE_HEADER = struct.Struct("<hB")
_PER_OCTAVE = 4
_SMALLEST = -126 * _PER_OCTAVE  # the smallest normal float32, so that no scale is zero
_SCOPES = ("tensor", "token")


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
        Whether tokens are brought to a common magnitude before quantisation. Needed where a few
        tokens or channels are far larger than the rest; costs about half a byte per token.

    Notes
    -----
    NaN and infinity are refused. A token scale is a power of 2^(1/4), and 64 octaves below the
    largest it is taken for zero.
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

    def _encode(self, tensor: torch.Tensor, samples: Sequence[int] | None) -> Payload:
        rows = as_rows(tensor)
        largest = finite_amax(rows)
        stack = Stack()
        header = b""
        if self._scaled:
            codes, origin = _scale_codes(largest)
            n_codes = int(codes.max()) + 1
            scale_weights = weigh(codes, n_codes)
            stack.push(codes, _padded(scale_weights))
            header = _SCALE_HEADER.pack(origin, n_codes - 1) + scale_weights.tobytes()
            rows = rows / _scales(codes, origin).to(rows.device)

        positions = kept_positions(rows, self._keep, self._per_token)
        values = rows.reshape(-1)[positions]
        magnitude = values.abs()
        grid = Grid.fit(magnitude, self._bits, self._clip)
        levels = grid.levels(magnitude, self._rounding, self._noise(magnitude))
        symbols = (2 * levels + (values < 0)).to(torch.int32).cpu().numpy()
        level_weights = weigh(symbols, 1 << self._bits)
        stack.push(symbols, normalise(level_weights))

        gaps = Gaps(len(symbols), rows.numel())
        gap_symbols = gaps.symbols(positions.cpu().numpy())
        stack.push(gap_symbols, gaps.probabilities)
        counts = _HEADER.pack(len(symbols), len(gap_symbols), grid.low, grid.high)
        return b"".join((counts, level_weights.tobytes(), header, stack.to_bytes()))

    def _decode(
        self,
        payload: memoryview,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        samples: Sequence[int] | None,
    ) -> torch.Tensor:
        n_rows, width = row_shape(shape)
        n = n_rows * width
        reader = _Reader(payload)
        n_kept, n_gaps, low, high = _HEADER.unpack(reader.take(_HEADER.size))
        if not (1 <= n_kept <= n_gaps <= n and 0 <= low <= high < float("inf")):
            raise corrupt("counts or range of values do not fit the tensor")
        level_weights = reader.weights(1 << self._bits)
        if self._scaled:
            origin, last = _SCALE_HEADER.unpack(reader.take(_SCALE_HEADER.size))
            scale_weights = reader.weights(last + 1)

        stack = Stack.from_bytes(reader.rest())
        gaps = Gaps(n_kept, n)
        positions = gaps.positions(stack.pop(n_gaps, gaps.probabilities))
        if len(positions) != n_kept or positions[-1] >= n:
            raise corrupt("positions do not fit the tensor")
        symbols = torch.from_numpy(stack.pop(n_kept, normalise(level_weights)))
        values = Grid(low, high, 1 << (self._bits - 1)).magnitudes(symbols >> 1)
        values.mul_(1 - 2 * (symbols & 1))
        rows = torch.zeros(n_rows, width)
        rows.reshape(-1)[torch.from_numpy(positions)] = values
        if self._scaled:
            codes = stack.pop(n_rows, _padded(scale_weights))
            rows *= _scales(codes, origin)
        stack.close()
        return rows.to(dtype).reshape(shape)

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        if self._rounding == "nearest":
            return like
        if self._generator is None or self._generator.device != like.device:
            self._generator = torch.Generator(like.device).manual_seed(self._seed)
        return torch.rand(like.shape, generator=self._generator, device=like.device)


def _scale_codes(largest: torch.Tensor) -> tuple[NDArray[np.int32], int]:
    """Return the scale of each row in steps of a quarter octave, less the smallest, and that."""
    steps = torch.ceil(_PER_OCTAVE * torch.log2(largest.cpu().reshape(-1)))
    codes = steps.clamp(min=max(steps.max().item() - 255, _SMALLEST)).to(torch.int32)
    origin = int(codes.min())
    return (codes - origin).numpy(), origin


def _scales(codes: NDArray[np.int32], origin: int) -> torch.Tensor:
    steps = torch.from_numpy(codes).to(torch.float64) + origin
    return torch.exp2(steps / _PER_OCTAVE).to(torch.float32).reshape(-1, 1)


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
