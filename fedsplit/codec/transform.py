"""Send coordinates in which a boundary is nearly independent (Karhunen-Loeve transform)."""

import struct
import zlib
from collections.abc import Sequence

import torch

from fedsplit.codec import checks
from fedsplit.codec.base import Codec, Payload, corrupt, from_raw, raw_bytes, saturate
from fedsplit.codec.dense import as_rows, finite_amax, row_shape
from fedsplit.errors import FedsplitError

_HEADER = struct.Struct("<BI")


class Transform(Codec):
    """Rotates tokens to the principal axes of an earlier tensor, then compresses them.

    Activations of a trained model vary in few directions. Along the principal axes a few columns
    carry most of the energy and the rest falls away, so that the same error takes far fewer bits.
    The axes are fitted to one tensor and sent with it (as bfloat16), and serve those that follow.

    Parameters
    ----------
    inner : Codec
        What the coordinates are sent with; `topk` with ``statistics: column`` fits.
    refit_every : int
        Tensors that one set of axes serves. Axes take ``width ** 2 * 2`` bytes.

    Notes
    -----
    NaN and infinity are refused. A receiver that missed the axes raises a `FedsplitError`; both
    ends then need new codecs.
    """

    def __init__(self, *, inner: Codec, refit_every: int = 256) -> None:
        self._inner = inner
        self._refit_every = checks.integer("refit_every", refit_every, 1, 1_000_000)
        self._n_sent = 0
        self._axes: torch.Tensor | None = None

    @property
    def working_bytes(self) -> float:
        """See `Codec.working_bytes`."""
        return self._inner.working_bytes + 24.0

    def _encode(self, tensor: torch.Tensor, samples: Sequence[int] | None) -> Payload:
        rows = as_rows(tensor)
        finite_amax(rows)
        width = rows.shape[1]
        fits = self._axes is not None and self._axes.shape[0] == width
        new = not fits or self._n_sent % self._refit_every == 0
        if new:
            self._axes = principal_axes(rows).to(torch.bfloat16).cpu()
            self._n_sent = 0
        assert self._axes is not None
        self._n_sent += 1
        sent = raw_bytes(self._axes)
        coordinates = rows @ self._axes.to(rows.device, torch.float32)
        header = _HEADER.pack(new, zlib.crc32(sent))
        return b"".join((header, sent if new else b"", self._inner.encode(coordinates)))

    def _decode(
        self,
        payload: memoryview,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        samples: Sequence[int] | None,
    ) -> torch.Tensor:
        n_rows, width = row_shape(shape)
        if len(payload) < _HEADER.size:
            raise corrupt("payload is cut short")
        new, digest = _HEADER.unpack(payload[: _HEADER.size])
        body = payload[_HEADER.size :]
        axes = self._axes
        if new:
            n_axes = 2 * width * width
            axes = from_raw(body[:n_axes], (width, width), torch.bfloat16).clone()
            body = body[n_axes:]
        if axes is None or zlib.crc32(raw_bytes(axes)) != digest:
            raise FedsplitError(
                "codec axes of the receiver do not match the sender's: both need new codecs"
            )
        if not axes.isfinite().all():
            raise corrupt("axes that are not finite")
        coordinates = self._inner.decode(body, (n_rows, width), torch.float32)
        self._axes = axes
        return saturate(coordinates @ axes.T.to(torch.float32), dtype).reshape(shape)


def principal_axes(rows: torch.Tensor) -> torch.Tensor:
    """Return the orthonormal axes [width, width] of `rows`, by falling energy."""
    double = rows.to(torch.float64)
    axes: torch.Tensor = torch.linalg.eigh(double.T @ double).eigenvectors
    return axes.flip(1).to(torch.float32)
