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
from fedsplit.growth import FEDEX, STACKING
from fedsplit.models.ranks import pair_of, residual_of, residuals, trained

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
    `beside` is the mean of the parts' residuals, U [out, k] and V [k, in].
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    shares: Tensor
    ranks: Sequence[int]
    beside: tuple[Tensor, Tensor]

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
        """Return U and V whose product is the mean of B A, and of residuals: exact, ranks add."""
        return _summed(self.product(self.shares[:, None] * self.trained()), self.beside)

    def component_means(self) -> Tensor:
        """Return weights by which a component is averaged over those parts that have it."""
        weights = self.shares[:, None] * self.trained()
        return weights / weights.sum(0)


_Rule = Callable[[_Factors], tuple[Tensor, Tensor]]
"""The B and A that come of a module's factors; or U and V of the residual that they leave."""


def _weighted(factors: _Factors, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of all B and of all A by `weights` [part, r]."""
    b = sum(b * w for b, w in zip(factors.b, weights, strict=True))
    a = sum(a * w[:, None] for a, w in zip(factors.a, weights, strict=True))
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return b, a


def _padded(factors: _Factors) -> tuple[Tensor, Tensor]:
    return _weighted(factors, factors.shares[:, None] * factors.trained())


def _left_out(factors: _Factors) -> tuple[Tensor, Tensor]:
    """Return what `_padded` lacks of the mean, at the rank that `growth` says.

    ``mean(B A) - mean(B) mean(A)`` is the covariance: the sum of ``w_i (B_i - mean(B)) A_i``. Of
    components that all have, the last ``w_n (B_n - mean(B))`` is minus the sum of the others.
    """
    trained = factors.trained()
    common = trained.all(0)
    mean_b, _ = _padded(factors)
    follows = factors.a[-1] * common[:, None]
    which = torch.cat([trained[:-1], trained[-1:] & ~common])
    return _chosen(
        factors, [b - mean_b for b in factors.b], [a - follows for a in factors.a], which
    )


def _all_of_it(factors: _Factors) -> tuple[Tensor, Tensor]:
    return _chosen(factors, factors.b, factors.a, factors.trained())


def _chosen(
    factors: _Factors, b: Sequence[Tensor], a: Sequence[Tensor], which: Tensor
) -> tuple[Tensor, Tensor]:
    """Return U and V of the weighted sum of the components `which` [part, r], and of residuals."""
    u = [(s * one)[:, own] for s, one, own in zip(factors.shares, b, which, strict=True)]
    v = [one[own] for one, own in zip(a, which, strict=True)]
    return _summed((torch.cat(u, dim=1), torch.cat(v)), factors.beside)


def _afresh(factors: _Factors) -> tuple[Tensor, Tensor]:
    b, a = _weighted(factors, factors.component_means())
    return torch.zeros_like(b), a


def _ffa(factors: _Factors) -> tuple[Tensor, Tensor]:
    a = factors.a[0]
    same = all(torch.equal(other, a) for other in factors.a[1:])
    require(same, "aggregator.adapters", FFA, "another one where A is trained (model.freeze_a)")
    return _padded(factors)[0], a


def _flexlora(factors: _Factors) -> tuple[Tensor, Tensor]:
    return _compressed(*factors.mean(), factors.whole)


def _raflora(factors: _Factors) -> tuple[Tensor, Tensor]:
    # A component is averaged over those alone that have it, so that no others pull it to zero.
    return _compressed(*factors.product(factors.component_means()), factors.whole)


_RULES: dict[str, _Rule] = {
    PADDED: _padded,
    RAFLORA: _raflora,
    FLEXLORA: _flexlora,
    FFA: _ffa,
    FEDEX: _padded,
    STACKING: _afresh,
}
_RESIDUALS: dict[str, _Rule] = {FEDEX: _left_out, STACKING: _all_of_it}
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
        ``fedex``: as ``padded``, and a residual of what is missing from it to the mean of all B A;
        exact. ``stacking``: all of the mean becomes the residual, B begins at zero again and A from
        the mean of each component over the parts that trained it; exact.
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
    return _by_module(parts, _RULES[how], _RESIDUALS.get(how))


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
            b, a = _whole(found, name)
            whole += _square(u, v)
            apart += _square(torch.cat([u, -b], dim=1), torch.cat([v, a]))
        return apart, whole

    apart, whole = compute(squares)
    return None if whole == 0 else float((apart / whole) ** 0.5)


def _by_module(parts: Sequence[Part], rule: _Rule, leave: _Rule | None = None) -> dict[str, Tensor]:
    first = parts[0].adapters
    like = trained(first)

    def merged() -> dict[str, Tensor]:
        found = {}
        for name, factors in _modules(parts):
            other = pair_of(name) or ""
            b, a = rule(factors)
            for key, value in ((name, a), (other, b)):
                found[key] = value.reshape(like[key].shape).to(like[key].dtype)
            u, v = _shortest(*(factors.beside if leave is None else leave(factors)))
            if len(v):
                dtype, shape = like[name].dtype, like[other].shape
                found[residual_of(name) or ""] = v.reshape(-1, *like[name].shape[1:]).to(dtype)
                found[residual_of(other) or ""] = u.reshape(shape[0], -1, *shape[2:]).to(dtype)
        return found

    low_rank = compute(merged)
    rest = [{n: part.adapters[n] for n in like if n not in low_rank} for part in parts]
    whole = low_rank | weighted_mean(rest, [part.weight for part in parts])
    return {name: whole[name] for name in like} | residuals(low_rank)


def _modules(parts: Sequence[Part]) -> Iterator[tuple[str, _Factors]]:
    """Yield the factors of each module by the name of its A; those of one are read at a time."""
    require(len(parts) > 0, "parts", len(parts), "at least 1")
    shares = torch.tensor([part.weight for part in parts], dtype=torch.float64)
    require(bool((shares > 0).all()), "weights", shares.tolist(), "above 0")
    shares = shares / shares.sum()
    for name in parts[0].adapters:
        other = pair_of(name)
        if other is not None:
            sets = [part.adapters for part in parts]
            b, a = zip(*(_matrices(one[other], one[name]) for one in sets), strict=True)
            whole = a[0].shape[0]
            ranks = [whole if part.rank is None else min(part.rank, whole) for part in parts]
            yield name, _Factors(a, b, shares, ranks, _beside(sets, name, shares))


def _beside(
    sets: Sequence[Mapping[str, Tensor]], name: str, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Return U and V of the mean residual of the module whose A is `name`."""
    first, *others = pairs = [_residual(one, name) for one in sets]
    if all(u.equal(first[0]) and v.equal(first[1]) for u, v in others):
        return first  # as where all began with it
    return _summed(*((s * u, v) for s, (u, v) in zip(shares, pairs, strict=True)))


def _residual(adapters: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Return U and V beside the A called `name`, of no component if there are none."""
    other = pair_of(name) or ""
    beside = adapters.get(residual_of(name) or "")
    if beside is not None:
        return _matrices(adapters[residual_of(other) or ""], beside)
    b, a = _matrices(adapters[other], adapters[name])
    return b[:, :0], a[:0]


def _whole(adapters: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Return all that stands for the module whose A is `name`, its residual too."""
    factors = _matrices(adapters[pair_of(name) or ""], adapters[name])
    return _summed(factors, _residual(adapters, name))


def _summed(*pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return U and V whose product is the sum of those of `pairs`."""
    us, vs = zip(*pairs, strict=True)
    return torch.cat(us, dim=1), torch.cat(vs)


def _shortest(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same product, of no higher rank than the matrix has dimensions."""
    rows, columns = u.shape[0], v.shape[1]
    if len(v) <= min(rows, columns):
        return u, v
    whole = u @ v
    none = torch.eye(min(rows, columns), dtype=u.dtype)
    return (none, whole) if rows <= columns else (whole, none)


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
