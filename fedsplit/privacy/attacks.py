"""Attacks on texts: from what crossed a cut to the tokens that it was made of.

All of them are an honest but curious server's: it follows the protocol, keeps what it gets, knows
the pretrained model, and has texts of its own, which it runs through the same blocks with the same
codec and defence to learn from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

_ROWS = 2048  # compared with the whole vocabulary at a time


@dataclass(frozen=True)
class Observed:
    """Boundaries as a server has them, and the tokens that they were made of.

    Parameters
    ----------
    vectors : Tensor
        Float, ``[positions, width]``: what crossed the cut for each token, padding left out.
    tokens : Tensor
        Int64, ``[positions]``.
    lengths : tuple of int
        Positions of each text, in order.
    """

    vectors: Tensor
    tokens: Tensor
    lengths: tuple[int, ...]

    def first(self, count: int) -> "Observed":
        """Return the first `count` texts."""
        return self.texts(0, count)

    def texts(self, start: int, stop: int) -> "Observed":
        """Return the texts from `start` to before `stop`."""
        begin, end = sum(self.lengths[:start]), sum(self.lengths[:stop])
        lengths = self.lengths[start:stop]
        return Observed(self.vectors[begin:end], self.tokens[begin:end], lengths)


Reader = Callable[[Observed], Tensor]
"""A trained attack: guesses the tokens of what it observes (whose own it does not look at)."""


def nearest_embedding(embedding: Tensor) -> Reader:
    """Return the attack that needs no texts: the token whose embedding points most the same way.

    Parameters
    ----------
    embedding : Tensor
        The model's input embeddings, ``[vocabulary, width]``.
    """

    def read(observed: Observed) -> Tensor:
        if observed.vectors.shape[1] != embedding.shape[1]:
            return torch.zeros_like(observed.tokens)
        return most_alike(observed.vectors, embedding)

    return read


@dataclass(frozen=True)
class RidgeMap:
    """A linear map from a boundary's vector to the embedding of its token.

    Parameters
    ----------
    mean, scale : Tensor
        What is subtracted from vectors, and what they are divided by, ``[width]``.
    weights : Tensor
        ``[width + 1, embedding width]``; the last row is added.
    """

    mean: Tensor
    scale: Tensor
    weights: Tensor

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the embeddings that `vectors` are mapped to."""
        return self.standard(vectors) @ self.weights[:-1] + self.weights[-1]

    def standard(self, vectors: Tensor) -> Tensor:
        """Return `vectors` as the map takes them."""
        return (vectors - self.mean) / self.scale


def fit_ridge(
    auxiliary: Observed, embedding: Tensor, softness: Sequence[float]
) -> tuple[RidgeMap, ...]:
    """Fit a `RidgeMap` for each `softness` on texts of the server's own.

    Parameters
    ----------
    auxiliary : Observed
        Boundaries of its texts.
    embedding : Tensor
        ``[vocabulary, width]``, centred.
    softness : sequence of float
        Weights of the squared weights, against that of one position.
    """
    mean, scale = auxiliary.vectors.mean(0), auxiliary.vectors.std(0).clamp_min(1e-6)
    rows = (auxiliary.vectors - mean) / scale
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1).double()
    square, wanted = rows.T @ rows, rows.T @ embedding[auxiliary.tokens].double()
    unit = torch.eye(len(square), dtype=square.dtype, device=square.device)
    solved = [torch.linalg.solve(square + weight * unit, wanted) for weight in softness]
    return tuple(RidgeMap(mean, scale, weights.float()) for weights in solved)


def most_alike(vectors: Tensor, embedding: Tensor) -> Tensor:
    """Return for each vector the token whose embedding has the largest cosine with it."""
    unit = normalize(embedding).T
    return torch.cat([(part @ unit).argmax(1) for part in torch.split(normalize(vectors), _ROWS)])
