"""Bits of the SFT codec as formulas, for planning; what is sent is measured, not computed."""

import heapq

import numpy as np
from numpy.typing import ArrayLike

from fedsplit.arrays import Array


def huffman_bits(counts: ArrayLike) -> int:
    """Return the length of the Huffman code of symbols that occur `counts` times, in bits.

    A single symbol takes one bit each time.
    """
    heap = [int(count) for count in np.asarray(counts).reshape(-1) if count > 0]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def entropy_bits(counts: ArrayLike) -> float:
    """Return the empirical entropy of symbols that occur `counts` times, in bits for all."""
    present: Array = np.asarray(counts, dtype=np.float64).reshape(-1)
    present = present[present > 0]
    return float(-(present * np.log2(present / present.sum())).sum())


def author_bits(magnitude_counts: ArrayLike, n: int) -> int:
    """Return the bits that SFT's authors charge for a tensor of `n` elements.

    Huffman code of the magnitude levels, a sign for each kept element, a bitmap of positions and
    two fp32 numbers (arXiv 2501.09237, released code).

    Parameters
    ----------
    magnitude_counts : array [levels]
        How often each magnitude level was kept.
    n : int
        Elements of the tensor.
    """
    return huffman_bits(magnitude_counts) + int(np.sum(magnitude_counts)) + n + 64


def ideal_bits(symbol_counts: ArrayLike, n: int) -> float:
    """Return the empirical entropy of positions and symbols (level and sign), in bits.

    Parameters
    ----------
    symbol_counts : array [symbols]
        How often each symbol was kept.
    n : int
        Elements of the tensor.
    """
    n_kept = int(np.sum(symbol_counts))
    return entropy_bits([n_kept, n - n_kept]) + entropy_bits(symbol_counts)
