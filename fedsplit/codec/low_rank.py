"""Send a matrix as the product of two thin ones (after SplitLite's residual compression)."""

import struct
from collections.abc import Sequence

import torch

from fedsplit.codec import checks
from fedsplit.codec.base import Codec, Payload, bounded, corrupt, saturate
from fedsplit.codec.dense import as_rows, finite_amax, row_shape
from fedsplit.errors import FedsplitError

_HEADER = struct.Struct("<I")
_OVERSAMPLING = 4
_POWER_ITERATIONS = 2
_HARMLESS = 16  # values of 4**16 and below can be squared and added up


class LowRank(Codec):
    """Sends the best approximation of `rank`, found by randomised truncated SVD.

    The tensor is seen as [tokens, width]. Made for differences between epochs (inside
    `Temporal`), which adapters of rank r keep at a low rank. NaN and infinity are refused.

    Parameters
    ----------
    factors : Codec
        What the two factors, [rank, tokens] and [rank, width], are sent with; each row is one
        component, so codecs with a scale per token fit.
    rank : int
        Number of components.
    """

    def __init__(self, *, factors: Codec, rank: int = 8, seed: int = 0) -> None:
        self._factors = factors
        self._rank = checks.integer("rank", rank, 1, 1_000_000)
        self._seed = seed

    @property
    def working_bytes(self) -> float:
        """See `Codec.working_bytes`."""
        return self._factors.working_bytes + 24.0

    def _encode(self, tensor: torch.Tensor, samples: Sequence[int] | None) -> Payload:
        rows = as_rows(tensor)
        exponent = _half_exponent(finite_amax(rows).max())
        # Powers of two change no digit, and squares of what is left stay within float32.
        try:
            left, right = truncated_svd(
                torch.ldexp(rows, -2 * exponent), self._rank_of(*rows.shape), self._seed
            )
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise FedsplitError(f"low_rank: tensor has no decomposition ({error})") from error
        left, right = torch.ldexp(left, exponent), torch.ldexp(right, exponent)
        left_bytes, right_bytes = self._factors.encode(left), self._factors.encode(right)
        return b"".join((_HEADER.pack(len(left_bytes)), left_bytes, right_bytes))

    def _decode(
        self,
        payload: memoryview,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        samples: Sequence[int] | None,
    ) -> torch.Tensor:
        if len(payload) < _HEADER.size:
            raise corrupt("payload is cut short")
        (n_left,) = _HEADER.unpack(payload[: _HEADER.size])
        body = payload[_HEADER.size :]
        n_rows, width = row_shape(shape)
        rank = self._rank_of(n_rows, width)
        left = self._factors.decode(body[:n_left], (rank, n_rows), torch.float32)
        right = self._factors.decode(body[n_left:], (rank, width), torch.float32)
        return saturate(bounded(left.T @ right), dtype).reshape(shape)

    def _rank_of(self, n_rows: int, width: int) -> int:
        return min(self._rank, n_rows, width)


def _half_exponent(largest: torch.Tensor) -> torch.Tensor:
    """Return n such that ``4**n`` is near `largest`, or 0 while its squares are harmless."""
    exponent = torch.frexp(largest).exponent // 2
    return torch.where(exponent.abs() > _HARMLESS, exponent, 0)


def truncated_svd(matrix: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `left` [rank, m] and `right` [rank, n] with ``left.T @ right`` close to `matrix`.

    Subspace iteration from a random start (Halko, Martinsson, Tropp, SIAM Review 2011, algorithm
    4.4), nearly the best approximation of that rank. Both factors carry the root of the singular
    values. (`torch.svd_lowrank` would draw from the global generator.)
    """
    generator = torch.Generator(matrix.device).manual_seed(seed)
    columns = min(rank + _OVERSAMPLING, *matrix.shape)
    start = torch.randn(
        matrix.shape[1], columns, generator=generator, device=matrix.device, dtype=matrix.dtype
    )
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = s[:rank, None].sqrt()
    return (basis @ u[:, :rank]).T * root, vh[:rank] * root
