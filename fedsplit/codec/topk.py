"""The SFT pipeline: keep the largest magnitudes, quantise them, code both without loss."""

from collections.abc import Sequence

import torch

from fedsplit.codec import checks
from fedsplit.codec.base import Codec, Payload, bounded, saturate
from fedsplit.codec.dense import as_rows, finite_amax, row_shape
from fedsplit.codec.packing import Quantised, Scales, pack, unpack
from fedsplit.codec.quantise import ROUNDINGS, Grid
from fedsplit.codec.sparsify import kept_positions
from fedsplit.errors import require_choice

_SCOPES = ("tensor", "token")
_STATISTICS = ("tensor", "column")


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
    statistics : {"tensor", "column"}
        Whether positions and levels are coded with the frequencies of the whole tensor, or of
        columns of like density; smaller, and slower, where columns differ much.

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
        statistics: str = "tensor",
        seed: int = 0,
    ) -> None:
        self._keep = checks.number("keep", keep, 1e-6, 1.0)
        self._bits = checks.integer("bits", bits, 2, 8)
        self._clip = checks.number("clip_percentile", clip_percentile, 1.0, 100.0)
        require_choice("codec.per", per, _SCOPES)
        require_choice("codec.scale", scale, _SCOPES)
        require_choice("codec.rounding", rounding, ROUNDINGS)
        require_choice("codec.statistics", statistics, _STATISTICS)
        self._by_column = statistics == "column"
        self._per_token, self._scaled, self._rounding = per == "token", scale == "token", rounding
        self._seed = seed
        self._generator: torch.Generator | None = None

    @property
    def working_bytes(self) -> float:
        """See `Codec.working_bytes`; whatever `keep` is, elements that tie are all kept."""
        return 70.0

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
        return pack(self.quantise(tensor), *row_shape(tensor.shape), self._by_column)

    def _decode(
        self,
        payload: memoryview,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        samples: Sequence[int] | None,
    ) -> torch.Tensor:
        n_rows, width = row_shape(shape)
        kept = unpack(
            payload,
            n_rows,
            width,
            bits=self._bits,
            scaled=self._scaled,
            by_column=self._by_column,
        )
        symbols = torch.from_numpy(kept.symbols)
        values = kept.grid.magnitudes(symbols >> 1)
        values.mul_(1 - 2 * (symbols & 1))
        rows = torch.zeros(n_rows, width, dtype=torch.float32)
        rows.reshape(-1)[torch.from_numpy(kept.positions)] = values
        if kept.scales is not None:
            bounded(rows.mul_(kept.scales.values()))
        return saturate(rows, dtype).reshape(shape)

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        if self._rounding == "nearest":
            return like
        if self._generator is None or self._generator.device != like.device:
            self._generator = torch.Generator(like.device).manual_seed(self._seed)
        return torch.rand(like.shape, generator=self._generator, device=like.device)
