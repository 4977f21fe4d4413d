"""How adapter sets become one: averages of A and B apart, or of what they do together.

An adapter changes its module by the product B A (at one scale for all, `fedsplit.models.ranks`).
Averaging A and B apart is not averaging the products; it errs by the covariance of B and A. All of
the following are functions of sets; what is no low-rank factor (a head, biases) is averaged as it
is. Components that no part was trained at, because all are of lower ranks, stay as they were.

Sources: HetLoRA (Cho et al., 2024: zero-padding), FlexLoRA (Bai et al., 2024), raFLoRA (arXiv
2602.13486), FFA-LoRA (Sun et al., ICLR 2024), FedEx-LoRA (arXiv 2410.09432), FLoRA (Wang et al.,
NeurIPS 2024: stacking).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedsplit.errors import FedsplitError, require, require_choice
from fedsplit.execution.average import weighted_mean
from fedsplit.execution.lane import compute
from fedsplit.models.ranks import pair_of

MEAN, PADDED, RAFLORA, FLEXLORA, FFA = "mean", "padded", "raflora", "flexlora", "ffa"
_ROW_NORM = 3**-0.5
"""Of a row of A as PEFT draws it, in the mean."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A set to be aggregated.

    Parameters
    ----------
    adapters : mapping of str to Tensor
        Whole: components that were not trained are there as they were before.
    weight : float
        How much it counts, above 0.
    rank : int or None
        How many components were trained; None for all.
    """

    adapters: Mapping[str, Tensor]
    weight: float
    rank: int | None = None


@dataclass(frozen=True)
class _Factors:
    """The A and B of one module in all parts, in double precision, as matrices.

    `a` is of shape [r, in], `b` of [out, r], at the whole rank r; `ranks` are those trained.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    shares: Tensor
    ranks: Sequence[int]

    @property
    def whole(self) -> int:
        return self.a[0].shape[0]

    def trained(self) -> Tensor:
        """Return which part (row) has trained which component (column); all have, if none has."""
        which = torch.arange(self.whole) < torch.tensor(self.ranks)[:, None]
        return which | ~which.any(0)

    def product(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return U and V whose product is the sum of all components by `weights` [part, r]."""
        u = torch.cat([b * w for b, w in zip(self.b, weights, strict=True)], dim=1)
        return u, torch.cat(list(self.a))

    def mean(self) -> tuple[Tensor, Tensor]:
        """Return U and V whose product is the mean of B A: `stacked`, exact at a larger rank."""
        return self.product(self.shares[:, None] * self.trained())


_Rule = Callable[[_Factors], tuple[Tensor, Tensor]]
"""The B and A that come of a module's factors."""


def _padded(factors: _Factors) -> tuple[Tensor, Tensor]:
    weights = factors.shares[:, None] * factors.trained()
    b = sum(b * w for b, w in zip(factors.b, weights, strict=True))
    a = sum(a * w[:, None] for a, w in zip(factors.a, weights, strict=True))
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return b, a


def _ffa(factors: _Factors) -> tuple[Tensor, Tensor]:
    a = factors.a[0]
    same = all(torch.equal(other, a) for other in factors.a[1:])
    require(same, "aggregator.adapters", FFA, "another one where A is trained (model.freeze_a)")
    return _padded(factors)[0], a


def _flexlora(factors: _Factors) -> tuple[Tensor, Tensor]:
    return _compressed(*factors.mean(), factors.whole)


def _raflora(factors: _Factors) -> tuple[Tensor, Tensor]:
    # A component is averaged over those alone that have it, so that no others pull it to zero.
    weights = factors.shares[:, None] * factors.trained()
    return _compressed(*factors.product(weights / weights.sum(0)), factors.whole)


_RULES: dict[str, _Rule] = {
    PADDED: _padded,
    RAFLORA: _raflora,
    FLEXLORA: _flexlora,
    FFA: _ffa,
}
AGGREGATIONS = (MEAN, *_RULES)
"""What `aggregate` can do."""


def aggregate(how: str, parts: Sequence[Part]) -> dict[str, Tensor]:
    """Return the one adapter set that comes of `parts`.

    Parameters
    ----------
    how : str
        ``mean``: A and B averaged apart, whole sets, of which components not trained are as they
        were. ``padded``: as that, but components not trained count as zero. ``flexlora``: the best
        approximation of the mean product. ``raflora``: as that, each component averaged over the
        parts that trained it. ``ffa``: the mean of B, where A is the same everywhere; exact.
    parts : sequence of Part
        At least one.

    Raises
    ------
    SettingsError
        If `how` is unknown, or A differs with ``ffa``.
    FedsplitError
        As `weighted_mean`.
    """
    require_choice("aggregator.adapters", how, AGGREGATIONS)
    if how == MEAN:
        return weighted_mean([part.adapters for part in parts], [part.weight for part in parts])
    return _by_module(parts, _RULES[how])


def fedex(
    parts: Sequence[Part],
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Return the padded means, and what is missing from them to the mean of all B A.

    The second is, by the name of each module's A, U [out, k] and V [k, in], in double precision:
    ``mean(B A) = mean(B) mean(A) + U V``. FedEx-LoRA adds U V to the module's frozen weight (at the
    adapter's scale), after which a plain adapter no longer holds everything.
    """
    residuals = {}
    for name, factors in _modules(parts):
        u, v = factors.mean()
        b, a = _padded(factors)
        residuals[name] = torch.cat([u, -b], dim=1), torch.cat([v, a])
    return _by_module(parts, _padded), residuals


def stacked(parts: Sequence[Part]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by the name of each module's A the B and A whose product is the mean, at rank sum."""
    return {name: factors.mean() for name, factors in _modules(parts)}


def aggregation_error(parts: Sequence[Part], found: Mapping[str, Tensor]) -> float | None:
    """Return how far the adapters `found` are from the mean of what `parts` do.

    ``||mean(B A) - B A|| / ||mean(B A)||`` in the Frobenius norm over all modules, without a
    matrix larger than the ranks together: only R of QR decompositions. None where there is
    nothing low-rank, or the mean is zero.
    """

    def squares() -> tuple[float, float]:
        apart = whole = 0.0
        for name, factors in _modules(parts):
            u, v = factors.mean()
            b, a = _matrices(found[pair_of(name) or ""], found[name])
            whole += _square(u, v)
            apart += _square(torch.cat([u, -b], dim=1), torch.cat([v, a]))
        return apart, whole

    apart, whole = compute(squares)
    return None if whole == 0 else float((apart / whole) ** 0.5)


def _by_module(parts: Sequence[Part], rule: _Rule) -> dict[str, Tensor]:
    first = parts[0].adapters

    def merged() -> dict[str, Tensor]:
        found = {}
        for name, factors in _modules(parts):
            b, a = rule(factors)
            for key, value in ((name, a), (pair_of(name) or "", b)):
                found[key] = value.reshape(first[key].shape).to(first[key].dtype)
        return found

    low_rank = compute(merged)
    rest = [{n: part.adapters[n] for n in first if n not in low_rank} for part in parts]
    whole = low_rank | weighted_mean(rest, [part.weight for part in parts])
    return {name: whole[name] for name in first}


def _modules(parts: Sequence[Part]) -> Iterator[tuple[str, _Factors]]:
    """Yield the factors of each module by the name of its A; those of one are read at a time."""
    require(len(parts) > 0, "parts", len(parts), "at least 1")
    shares = torch.tensor([part.weight for part in parts], dtype=torch.float64)
    require(bool((shares > 0).all()), "weights", shares.tolist(), "above 0")
    for name in parts[0].adapters:
        other = pair_of(name)
        if other is not None:
            sets = [part.adapters for part in parts]
            b, a = zip(*(_matrices(one[other], one[name]) for one in sets), strict=True)
            whole = a[0].shape[0]
            ranks = [whole if part.rank is None else min(part.rank, whole) for part in parts]
            yield name, _Factors(a, b, shares / shares.sum(), ranks)


def _matrices(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return B and A as matrices; those of convolutions have more axes."""
    a = a.double().flatten(1)
    b = b.double().flatten(1)
    if b.shape[1] != a.shape[0]:
        raise FedsplitError(f"adapters: B {tuple(b.shape)} and A {tuple(a.shape)} are no product")
    return b, a


def _square(u: Tensor, v: Tensor) -> float:
    """Return the square of the Frobenius norm of U V."""
    (_, left), (_, right) = torch.linalg.qr(u, mode="r"), torch.linalg.qr(v.T, mode="r")
    return float((left @ right.T).square().sum())


def _compressed(u: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B and A of `rank` whose product is nearest to U V.

    The rows of A are orthogonal and as long as those that PEFT draws, and B has the rest, so that
    training goes on as it began; the largest component comes first. A row's sign is such that its
    largest entry is above 0: nothing depends on a library's choice.
    """
    (left, r_left), (right, r_right) = torch.linalg.qr(u), torch.linalg.qr(v.T)
    inner, sizes, outer = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    b, a = left @ (inner * sizes), outer @ right.T
    b, a = b[:, :rank] / _ROW_NORM, a[:rank] * _ROW_NORM
    largest = a.gather(1, a.abs().argmax(1, keepdim=True)).squeeze(1)
    signs = torch.where(largest < 0, -1.0, 1.0).to(a.dtype)
    short = rank - a.shape[0]  # more components than the module has dimensions
    b, a = b * signs, a * signs[:, None]
    return pad(b, (0, short)), pad(a, (0, 0, 0, short))
