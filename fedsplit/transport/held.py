"""What a server keeps of a device whose blocks only infer: its samples' boundaries, sent once."""

import mmap
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsplit.codec.base import from_raw, raw_bytes
from fedsplit.errors import FedsplitError
from fedsplit.models import Boundary
from fedsplit.transport.frames import FrameError

_MOST = 10_000_000


@dataclass(frozen=True)
class _Form:
    """What the rows of all samples have in common."""

    inputs: tuple[str, ...]
    layout: str
    rows: tuple[tuple[torch.dtype, tuple[int, ...]], ...]


class Held:
    """A device's samples as they cross its cut: masks, labels and boundary, a row of each.

    Rows beyond the memory allowed are in a file without a name, which ends with this process, and
    come back with a checksum compared.

    Parameters
    ----------
    most : int
        Samples that the device has; more are not taken.
    memory_bytes : int
        Rows kept in memory.
    """

    def __init__(self, most: int, memory_bytes: int) -> None:
        self._most, self._room = most, memory_bytes
        self._key = ""
        self._forget()

    def _forget(self) -> None:
        self._form: _Form | None = None
        self._near: dict[int, bytes] = {}
        self._far: dict[int, tuple[int, int]] = {}  # place in the file, checksum
        self._near_bytes = 0
        self._file = tempfile.TemporaryFile(prefix="fedsplit-held-")  # noqa: SIM115

    def begin(self, key: str) -> None:
        """Say what the next rows are made with; those made with something else are forgotten."""
        if key != self._key:
            self._file.close()
            self._forget()
            self._key = key

    @property
    def samples(self) -> tuple[int, ...]:
        """The samples that are held, in order."""
        return tuple(sorted([*self._near, *self._far]))

    @property
    def file_bytes(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._file.fileno()).st_size

    def missing(self, samples: Sequence[int]) -> tuple[int, ...]:
        """Return those of `samples` that are not held, each once."""
        return tuple(dict.fromkeys(s for s in samples if not (s in self._near or s in self._far)))

    def put(self, samples: Sequence[int], inputs: Mapping[str, Tensor], boundary: Boundary) -> None:
        """Keep the rows of `samples`, none of which is held.

        Raises
        ------
        FrameError
            If they are not of the form of those before, or more than the device has.
        FedsplitError
            If there is no room in the file.
        """
        names = tuple(sorted(inputs))
        tensors = [*(inputs[name] for name in names), *boundary.tensors]
        if any(tensor.dim() < 1 or len(tensor) != len(samples) for tensor in tensors):
            raise FrameError("boundary: must have a row for each sample where a device is frozen")
        rows = tuple((tensor.dtype, tuple(tensor.shape[1:])) for tensor in tensors)
        form = _Form(names, boundary.layout, rows)
        if self._form not in (None, form):
            raise FrameError(
                "boundary: must be of one size in all mini-batches where a device is frozen "
                "(data.padding=fixed)"
            )
        held = len(self._near) + len(self._far) + len(samples)
        if held > self._most:
            raise FrameError(f"samples={held}: must be at most {self._most}, the device's")
        self._form = form
        plain = [tensor.detach().cpu().contiguous() for tensor in tensors]
        for place, sample in enumerate(samples):
            self._keep(sample, b"".join(raw_bytes(tensor[place]) for tensor in plain))

    def take(self, samples: Sequence[int]) -> tuple[dict[str, Tensor], Boundary]:
        """Return inputs and boundary of a mini-batch of `samples`, all of which are held.

        Raises
        ------
        FedsplitError
            If a row in the file is not what was written.
        """
        form = self._form
        assert form is not None
        columns: list[list[Tensor]] = [[] for _ in form.rows]
        view = self._view()
        for sample in samples:
            row, start = memoryview(self._row(sample, view)), 0
            for column, (dtype, shape) in zip(columns, form.rows, strict=True):
                size = dtype.itemsize * torch.Size(shape).numel()
                column.append(_tensor(row[start : start + size], dtype, shape))
                start += size
        if view is not None:
            view.close()
        tensors = [torch.stack(column) for column in columns]
        inputs = dict(zip(form.inputs, tensors, strict=False))
        return inputs, Boundary(tuple(tensors[len(inputs) :]), form.layout)

    def _keep(self, sample: int, row: bytes) -> None:
        if self._near_bytes + len(row) <= self._room:
            self._near[sample] = row
            self._near_bytes += len(row)
            return
        place = self.file_bytes
        try:
            # Not by the mapping: a full disk would end the process.
            written = os.pwrite(self._file.fileno(), row, place)
        except OSError as error:
            written, why = 0, str(error.strerror)
        else:
            why = "the disk is full"
        if written != len(row):
            os.ftruncate(self._file.fileno(), place)
            folder = tempfile.gettempdir()
            raise FedsplitError(
                f"TMPDIR={folder!r}: cannot hold the boundaries of a device ({why})"
            )
        self._far[sample] = place, zlib.crc32(row)

    def _view(self) -> mmap.mmap | None:
        if not self._far:
            return None
        return mmap.mmap(self._file.fileno(), self.file_bytes, access=mmap.ACCESS_READ)

    def _row(self, sample: int, view: mmap.mmap | None) -> bytes:
        if view is None or sample in self._near:
            return self._near[sample]
        assert self._form is not None
        place, checksum = self._far[sample]
        size = sum(d.itemsize * torch.Size(shape).numel() for d, shape in self._form.rows)
        row = view[place : place + size]
        if zlib.crc32(row) != checksum:
            raise FedsplitError(f"sample {sample}: its row in the file is not what was written")
        return row


def spans(samples: Sequence[int], most: int) -> tuple[int, ...]:
    """Return sorted `samples` as starts and stops of runs; the first of them if above `most`."""
    edges: list[int] = []
    for sample in samples:
        if edges and edges[-1] == sample:
            edges[-1] = sample + 1
        elif len(edges) + 2 > most:
            break
        else:
            edges += [sample, sample + 1]
    return tuple(edges)


def read_spans(edges: Sequence[int]) -> frozenset[int]:
    """Return the samples that `spans` wrote.

    Raises
    ------
    FrameError
        If they are no runs, or of too many samples.
    """
    if len(edges) % 2 or list(edges) != sorted(edges):
        raise FrameError("samples: must be starts and stops of runs")
    runs = [range(*pair) for pair in zip(edges[::2], edges[1::2], strict=True)]
    count = sum(map(len, runs))
    if count > _MOST:
        raise FrameError(f"samples={count}: must be at most {_MOST}")
    return frozenset(sample for run in runs for sample in run)


def _tensor(row: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return from_raw(row, shape, dtype) if row.nbytes else torch.empty(shape, dtype=dtype)
