"""Adapter sets that wait on disk until the wrapped strategy reads them.

Flower's strategies take a list with every branch's complete set. Those that average go through it
once, array by array: so what is read from disk when it is asked for needs the memory of one array,
however many branches there are, and the strategy's own code computes what it would have computed.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from fedsplit.errors import FedsplitError
from fedsplit.flower.messages import NUMPY, holdable


class Spool:
    """A file without a name, in the folder for temporary files; it lasts as long as its arrays."""

    def __init__(self) -> None:
        # Closed when the last of its arrays is gone.
        self._file = tempfile.TemporaryFile(prefix="fedsplit-adapters-")  # noqa: SIM115
        self._end = 0

    def put(self, adapters: Mapping[str, Tensor]) -> "Spooled":
        """Write a set to the file; return what reads it.

        Raises
        ------
        FedsplitError
            If there is no room for it.
        """
        arrays: dict[str, Array] = {}
        try:
            for name, tensor in adapters.items():
                values = holdable(tensor).numpy()
                self._file.write(np.ascontiguousarray(values).data)
                arrays[name] = _Waiting(values, self._file, self._end)
                self._end += values.nbytes
            self._file.flush()
        except OSError as error:
            folder = tempfile.gettempdir()
            message = f"TMPDIR={folder!r}: cannot hold the adapters of a round ({error.strerror})"
            raise FedsplitError(message) from error
        return Spooled(arrays)


@dataclass(frozen=True)
class Spooled(Mapping[str, Tensor]):
    """An adapter set on disk; a tensor is read whenever it is looked up."""

    arrays: Mapping[str, Array]

    def record(self) -> ArrayRecord:
        """Return Flower's form of it, which also reads an array whenever it is looked at."""
        record = ArrayRecord()
        for name, array in self.arrays.items():
            record[name] = array
        return record

    def __getitem__(self, name: str) -> Tensor:
        return from_numpy(self.arrays[name].numpy())

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


class _Waiting(Array):
    """A Flower array whose values are read from a file."""

    def __init__(self, values: NDArray[Any], file: IO[bytes], start: int) -> None:
        self.dtype, self.shape, self.stype = str(values.dtype), values.shape, NUMPY
        self._file, self._start, self._size = file, start, values.nbytes

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The serialized array."""
        return Array.from_numpy_ndarray(self.numpy()).data

    def numpy(self) -> NDArray[Any]:
        """The array."""
        read = bytearray(os.pread(self._file.fileno(), self._size, self._start))
        return np.frombuffer(read, self.dtype).reshape(self.shape)
