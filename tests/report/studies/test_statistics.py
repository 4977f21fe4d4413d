"""Intervals and tests against what they are by definition."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsplit.report.studies.statistics import half_width, holm, least_p, paired_p, pairwise

NUMBERS = st.lists(st.integers(-9, 9).map(float), min_size=2, max_size=6)


@settings(max_examples=25, deadline=None)
@given(NUMBERS)
def test_p_is_the_share_of_sign_patterns_that_are_as_extreme(differences: list[float]) -> None:
    values = np.array(differences)
    means = [np.mean(values * signs) for signs in product((1, -1), repeat=len(values))]
    seen = np.mean(values)
    low, high = (np.mean([s * m >= s * seen - 1e-9 for m in means]) for s in (-1, 1))
    expected = 1.0 if not values.any() else min(1.0, 2 * min(low, high))
    assert paired_p(values, np.zeros(len(values))) == pytest.approx(expected)


@pytest.mark.parametrize("seeds", [2, 5, 8])
def test_seeds_bound_the_p_value(seeds: int) -> None:
    worse = np.arange(seeds) + 1.0
    assert paired_p(worse, np.zeros(seeds)) == pytest.approx(least_p(seeds))
    assert least_p(5) == pytest.approx(0.0625)


def test_one_pair_says_nothing() -> None:
    assert np.isnan(paired_p([1.0], [2.0]))
    assert np.isnan(half_width([1.0]))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([0.01, float("nan")]) == pytest.approx([0.01, float("nan")], nan_ok=True)


def test_an_interval_is_students() -> None:
    values = [3.0, 3.4, 2.9, 3.3]
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert half_width([*values, float("nan")]) == pytest.approx((high - low) / 2)


def test_pairs_are_of_the_seeds_that_both_have() -> None:
    values = pd.DataFrame({"a": [1.0, 2.0, np.nan], "b": [2.0, 4.0, 9.0], "c": [1.0, 2.0, 3.0]})
    table = pairwise(values)
    assert list(zip(table["first"], table["second"], strict=True)) == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    assert table["pairs"].tolist() == [2, 2, 3]
    assert table["difference"].tolist() == pytest.approx([-1.5, 0.0, 3.0])
    assert table["p"].tolist() == pytest.approx([0.5, 1.0, 0.25])
    assert table["p_holm"].tolist() == pytest.approx([1.0, 1.0, 0.75])
