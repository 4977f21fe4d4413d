"""The most memory that this process held during a turn."""

from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Count from what is held now; without effect where the system keeps no such count."""
    with suppress(OSError):
        _FORGET.write_text("5")  # the high-water mark of resident memory, and nothing else
    if _has_gpu():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Return the most bytes of resident and GPU memory since `forget_peak`; 0 if unknown.

    Of two turns in one process, each counts the other's too.
    """
    gpu = torch.cuda.max_memory_allocated() if _has_gpu() else 0
    with suppress(OSError, StopIteration, ValueError):
        lines = _STATUS.read_text().splitlines()
        mark = next(line for line in lines if line.startswith("VmHWM:"))
        return int(mark.split()[1]) * 1024 + gpu
    return gpu


def _has_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
