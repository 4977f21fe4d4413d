"""Intervals over seeds, and whether two schemes differ."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

LEVEL = 0.95


def half_width(values: ArrayLike, level: float = LEVEL) -> float:
    """Return half the width of the confidence interval of a mean, by Student's t.

    Parameters
    ----------
    values : array_like, shape (n,)
        One for each seed.
    level : float
        Share of such intervals that hold the true mean, if values are normal.

    Returns
    -------
    float
        In the unit of `values`; NaN of fewer than two.
    """
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return float("nan")
    return float(stats.t.ppf((1 + level) / 2, len(known) - 1) * stats.sem(known))


def least_p(n_pairs: int) -> float:
    """Return the least p value that `paired_p` can give from so many pairs: ``2 / 2**n``."""
    return min(1.0, 2.0 / 2.0**n_pairs)


def paired_p(first: ArrayLike, second: ArrayLike) -> float:
    """Return the p value of "both are the same", by the exact sign-flip test of the mean.

    Under that hypothesis each pair's difference could as well have the other sign; all ``2**n``
    patterns of signs are tried (`scipy.stats.permutation_test`, ``samples``). Nothing is supposed
    of how values are distributed.

    Parameters
    ----------
    first, second : array_like, shape (n,)
        The same seeds, in the same order.

    Returns
    -------
    float
        Two-sided; NaN of fewer than two pairs.
    """
    one, other = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if len(one) < 2:
        return float("nan")
    if np.array_equal(one, other):
        return 1.0
    tried = stats.permutation_test(
        (one - other,),
        lambda sample, axis: np.mean(sample, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=100_000,
        rng=np.random.default_rng(0),
    )
    return float(tried.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for there being several, by Holm's step-down rule.

    NaN stands for a comparison that could not be made; it counts for none.
    """
    values = np.asarray(p_values, dtype=float)
    corrected = np.full(len(values), np.nan)
    made = np.flatnonzero(~np.isnan(values))
    order = made[np.argsort(values[made], kind="stable")]
    left = len(order) - np.arange(len(order))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * left))
    return [float(value) for value in corrected]


def pairwise(values: pd.DataFrame) -> pd.DataFrame:
    """Compare every two columns over the rows (seeds) that both have.

    Returns
    -------
    DataFrame
        A row per pair: ``first``, ``second``, ``pairs``, ``difference`` (mean of first minus
        second), ``half_width`` (of its 95 % interval), ``p``, ``p_holm`` (corrected for all
        rows), ``least_p`` (that so many pairs can give).
    """
    rows = []
    for first, second in combinations(values.columns, 2):
        both = values[[first, second]].dropna()
        differences = both[first] - both[second]
        rows.append(
            {
                "first": first,
                "second": second,
                "pairs": len(both),
                "difference": differences.mean(),
                "half_width": half_width(differences),
                "p": paired_p(both[first], both[second]),
                "least_p": least_p(len(both)),
            }
        )
    columns = ["first", "second", "pairs", "difference", "half_width", "p", "least_p"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(6, "p_holm", holm(table["p"].tolist()))
    return table
