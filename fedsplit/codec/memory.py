"""What a codec remembers of each sample, in bounded memory."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from fedsplit.errors import require


@dataclass(frozen=True)
class Entry:
    """What is remembered of a sample, ``[positions, width]``, and its frames since a whole one."""

    row: torch.Tensor
    age: int


Entries = tuple[tuple[int, Entry], ...]
"""Samples and what is remembered of each, the longest unused first."""
Visits = list[tuple[int, torch.Tensor]]
"""Samples in the order of a mini-batch, and the positions of each, ``[positions, width]``."""


@dataclass
class Remembered:
    """What one end of a device's link remembers from turn to turn, by stream.

    `of` says what the rows are of (route and codecs): those of something else are of no use.
    """

    of: str = ""
    streams: dict[str, Entries] = field(default_factory=dict)


class SampleMemory:
    """Rows by sample, kept as bfloat16; the longest unused go when `limit_bytes` are full.

    Two memories that see the same calls hold the same rows, so both ends of a stream evict alike.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def n_bytes(self) -> int:
        """Bytes that the rows take."""
        return self._size

    def get(self, sample: int) -> Entry | None:
        """Return what is remembered of `sample`."""
        return self._entries.get(sample)

    def put(self, sample: int, row: torch.Tensor, age: int) -> None:
        """Remember a copy of `row`, and forget the longest unused rows if there is no room."""
        self._drop(sample)
        narrow = row.to(torch.bfloat16, copy=True)
        self._entries[sample] = Entry(narrow, age)
        self._size += narrow.nbytes
        while self._size > self.limit_bytes:
            self._drop(next(iter(self._entries)))

    @property
    def entries(self) -> Entries:
        """Everything that is remembered."""
        return tuple(self._entries.items())

    def restore(self, entries: Iterable[tuple[int, Entry]]) -> None:
        """Remember what another memory had as its `entries`."""
        for sample, entry in entries:
            self.put(sample, entry.row, entry.age)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._size = 0

    def _drop(self, sample: int) -> None:
        entry = self._entries.pop(sample, None)
        if entry is not None:
            self._size -= entry.row.nbytes


def visits(tensor: torch.Tensor, samples: Sequence[int]) -> Visits:
    """Return what each sample has of `tensor`, in order, as views of it.

    Neighbouring rows of one sample are one visit, so that its positions are the same whether the
    tensor has a row for each sample or for each token that was not left out.

    Parameters
    ----------
    tensor : Tensor
        Contiguous, of at least one dimension.
    samples : sequence of int
        The sample of each row ``tensor[i]``.

    Raises
    ------
    SettingsError
        If they are not one for each row.
    """
    n = len(tensor)
    require(len(samples) == n, "samples", tuple(samples[:8]), f"one for each of {n} rows")
    runs = [(sample, len(list(run))) for sample, run in groupby(samples)]
    width = tensor.shape[-1] if tensor.dim() > 1 else 1
    parts = torch.split(tensor, [rows for _, rows in runs])
    return [(sample, part.view(-1, width)) for (sample, _), part in zip(runs, parts, strict=True)]


def fit(row: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return `row` as float32, cropped or filled with zeros to `shape`, of as many dimensions.

    Where padding is sent a sample is as long as the longest of its mini-batch.
    """
    if row.shape == tuple(shape):
        return row.to(torch.float32)
    fitted = torch.zeros(tuple(shape), dtype=torch.float32)
    common = tuple(slice(0, min(a, b)) for a, b in zip(row.shape, shape, strict=True))
    fitted[common] = row[common].to(torch.float32)
    return fitted
