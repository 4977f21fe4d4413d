"""How much of a text an attack has read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Success:
    """What an attack got right.

    Parameters
    ----------
    tokens : float
        Share of the positions whose token was read exactly, over all texts.
    rouge_l : float
        Mean over the texts of ROUGE-L (F1) of their tokens.
    """

    tokens: float
    rouge_l: float


def success(guessed: Tensor, true: Tensor, lengths: Sequence[int]) -> Success:
    """Compare the tokens `guessed` of texts of these `lengths`, one behind the other, with theirs.

    Parameters
    ----------
    guessed, true : Tensor
        Token ids, shape ``[sum(lengths)]``.
    lengths : sequence of int
        Tokens of each text.
    """
    pairs = zip(torch.split(guessed, list(lengths)), torch.split(true, list(lengths)), strict=True)
    rouge = [rouge_l(mine.tolist(), theirs.tolist()) for mine, theirs in pairs]
    return Success(float((guessed == true).double().mean()), float(np.mean(rouge)))


def rouge_l(guessed: Sequence[int], true: Sequence[int]) -> float:
    """Return the F1 of the longest common subsequence of two texts of tokens.

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries", ACL 2004 workshop,
    section 3.
    """
    if not guessed or not true:
        return 0.0
    theirs = np.asarray(true)
    row = np.zeros(len(true) + 1, dtype=np.int64)
    for token in guessed:
        longer = np.where(theirs == token, row[:-1] + 1, row[1:])
        row[1:] = np.maximum.accumulate(longer)
    return float(2 * row[-1] / (len(guessed) + len(true)))


def guessing(auxiliary: Tensor, true: Tensor) -> float:
    """Return the share of `true` tokens that are the most frequent one of `auxiliary` texts."""
    return float((true == torch.mode(auxiliary).values).double().mean())
