"""Entropy coding of positions and symbols with the range coder family of `constriction`.

Everything goes through one ANS coder, a stack: what is pushed last is popped first. Probabilities
are computed by exactly rounded operations only, so that both ends agree on any machine.
"""

import constriction
import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.codec.base import corrupt

Symbols = NDArray[np.int32]

_SEAL = np.array([0x5EA1ED00], dtype=np.uint32)
"""Lies at the bottom of every stack; popping damaged bytes hardly ever ends on it."""


class Stack:
    """ANS coder. Its memory depends on how much is asked for, not on what the bytes say."""

    def __init__(self, words: NDArray[np.uint32] = _SEAL) -> None:
        try:
            self._coder = constriction.stream.stack.AnsCoder(words)
        except ValueError as error:
            raise corrupt(str(error)) from error

    @classmethod
    def from_bytes(cls, payload: memoryview) -> "Stack":
        """Return the stack whose bytes `to_bytes` wrote.

        Raises
        ------
        FedsplitError
            If they cannot be such bytes.
        """
        if len(payload) % 4 != 0:
            raise corrupt("entropy-coded part is cut short")
        return cls(np.frombuffer(payload, dtype="<u4").astype(np.uint32))

    def to_bytes(self) -> bytes:
        """Return everything pushed so far."""
        return bytes(self._coder.get_compressed().astype("<u4").tobytes())

    def push(self, symbols: Symbols, probabilities: Array) -> None:
        """Add `symbols`, which index `probabilities`, so that `pop` returns them in order."""
        self._coder.encode_reverse(symbols, _model(probabilities))

    def pop(self, n: int, probabilities: Array) -> Symbols:
        """Take `n` symbols off; damaged bytes give arbitrary ones."""
        return np.asarray(self._coder.decode(_model(probabilities), n), dtype=np.int32)

    def close(self) -> None:
        """Check that everything was popped.

        Raises
        ------
        FedsplitError
            If something is left, which damage nearly always causes.
        """
        if not np.array_equal(self._coder.get_compressed(), _SEAL):
            raise corrupt("entropy-coded part does not end where it should")


def _model(probabilities: Array) -> "constriction.stream.model.Categorical":
    return constriction.stream.model.Categorical(probabilities, perfect=False)


_WEIGHTS = np.array([0, *((16 + i % 16) << (i // 16) for i in range(255))], dtype=np.int64)
"""What each byte of a histogram stands for: zero, or a number good to 3 % up to 2^20."""


def weigh(symbols: Symbols, n: int) -> NDArray[np.uint8]:
    """Return the histogram of `symbols` over [0, n), one byte each.

    Coding with these rounded counts costs next to nothing more than with the exact ones.
    """
    counts = np.bincount(symbols, minlength=n)
    scaled = counts * _WEIGHTS[-1] // counts.max()
    codes = np.searchsorted(_WEIGHTS, np.maximum(scaled, counts > 0))
    return np.asarray(codes, dtype=np.uint8)


def normalise(weights: NDArray[np.uint8]) -> Array:
    """Return the probabilities that a histogram of `weigh` stands for.

    Raises
    ------
    FedsplitError
        If all counts are zero.
    """
    counts = _WEIGHTS[weights]
    if not counts.any():
        raise corrupt("a histogram without counts")
    return np.asarray(counts / counts.sum(), dtype=np.float64)


class Gaps:
    """Model of the gaps between positions that were chosen independently with one density.

    Gaps are then geometric. A gap of `escape` or more is sent as an escape symbol (this many
    elements, none chosen) and what remains; the geometric law forgets, so this costs nothing.
    """

    def __init__(self, n_chosen: int, n: int) -> None:
        density = n_chosen / n
        self.escape = 1 << min(max(int(np.ceil(np.log2(4 / density))), 1), 12)
        survival = np.full(self.escape + 1, 1 - density)
        survival[0] = 1.0
        survival = np.cumprod(survival)
        self.probabilities = survival * density
        self.probabilities[-1] = survival[-1]

    def symbols(self, positions: NDArray[np.int64]) -> Symbols:
        """Return the symbols that stand for ascending `positions`."""
        gaps = np.diff(positions, prepend=-1) - 1
        if gaps.max() < self.escape:
            return gaps.astype(np.int32)
        n_escapes, rest = np.divmod(gaps, self.escape)
        symbols = np.full(len(gaps) + int(n_escapes.sum()), self.escape, dtype=np.int32)
        symbols[np.cumsum(n_escapes + 1) - 1] = rest
        return symbols

    def positions(self, symbols: Symbols) -> NDArray[np.int64]:
        """Undo `symbols`."""
        chosen = symbols != self.escape
        ends = np.cumsum(symbols + chosen, dtype=np.int64)
        return (ends if chosen.all() else ends[chosen]) - 1
