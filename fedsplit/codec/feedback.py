"""Error feedback: add to a gradient what compression took from it last time."""

from collections.abc import Sequence

import torch

from fedsplit.codec import checks
from fedsplit.codec.base import Codec, Payload, saturate
from fedsplit.codec.memory import SampleMemory, fit, visits


class ErrorFeedback(Codec):
    """Adds the error of a sample's last visit before it compresses; only the sender remembers.

    What top-k leaves out of a gradient this epoch comes through in a later one. Without
    `samples`, the row at the same place of the last tensor counts as the same sample.

    Parameters
    ----------
    inner : Codec
        What the corrected tensor is sent with.
    memory_mb : float
        Memory for remembered errors, in 10^6 bytes (two bytes an element).
    over_turns : bool
        Whether a device's next turn goes on with the errors of its last one.
    """

    remembers = True

    def __init__(self, *, inner: Codec, memory_mb: float = 256.0, over_turns: bool = False) -> None:
        self._inner = inner
        limit = checks.number("memory_mb", memory_mb, 0.0, 1e6) * 1e6
        self._errors = SampleMemory(int(limit))
        self.lasting = self._errors if checks.flag("over_turns", over_turns) else None

    @property
    def working_bytes(self) -> float:
        """See `Codec.working_bytes`."""
        return self._inner.working_bytes + 24.0

    def _encode(self, tensor: torch.Tensor, samples: Sequence[int] | None) -> Payload:
        rows = tensor.cpu().to(torch.float32, copy=True).contiguous()
        rows = rows if rows.dim() > 0 else rows.reshape(1)
        seen = visits(rows, samples if samples is not None else range(len(rows)))
        for owner, part in seen:
            entry = self._errors.get(owner)
            if entry is not None:
                part += fit(entry.row, part.shape)
        payload = self._inner.encode(rows, samples)
        rows -= self._inner.decode(payload, rows.shape, torch.float32, samples)
        for owner, part in seen:
            self._errors.put(owner, part, 0)
        return payload

    def _decode(
        self,
        payload: memoryview,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        samples: Sequence[int] | None,
    ) -> torch.Tensor:
        rows = self._inner.decode(payload, shape if len(shape) > 0 else (1,), torch.float32)
        return saturate(rows, dtype).reshape(shape)
