"""Groups are balanced: exactly for few devices, within Graham's bound for many."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.planning.grouping import balanced_groups, exact_groups, random_groups

_TIMES = st.lists(st.floats(0.01, 100), min_size=1, max_size=7)


def _best_s(times: list[float], n_groups: int) -> float:
    return min(
        np.bincount(choice, times, minlength=n_groups).max()
        for choice in product(range(n_groups), repeat=len(times))
    )


@settings(max_examples=60)
@given(_TIMES, st.integers(1, 4))
def test_exact_equals_enumeration_and_lpt_keeps_its_guarantee(times, n_groups: int) -> None:
    n_groups = min(n_groups, len(times))
    best = _best_s(times, n_groups)
    exact, quick = exact_groups(times, n_groups), balanced_groups(times, n_groups)
    assert exact.makespan_s == pytest.approx(best, rel=1e-12)
    assert exact.bound_s <= best * (1 + 1e-12)
    assert quick.makespan_s <= best * (4 / 3 - 1 / (3 * n_groups)) * (1 + 1e-12)


@given(_TIMES, st.integers(1, 7), st.integers(0, 2**32))
def test_every_device_is_in_one_group_and_no_group_is_empty(times, n_groups: int, seed) -> None:
    n_groups = min(n_groups, len(times))
    for found in (
        balanced_groups(times, n_groups),
        exact_groups(times, n_groups),
        random_groups(times, n_groups, np.random.default_rng(seed)),
    ):
        assert len(found.groups) == n_groups
        assert all(found.groups)
        assert sorted(device for group in found.groups for device in group) == list(
            range(len(times))
        )
        slowest = max(sum(times[device] for device in group) for group in found.groups)
        assert found.makespan_s == pytest.approx(slowest)
        assert found.bound_s <= found.makespan_s


def test_random_groups_have_equal_sizes() -> None:
    sizes = [len(g) for g in random_groups(np.ones(11), 4, np.random.default_rng(0)).groups]
    assert sorted(sizes) == [2, 3, 3, 3]


def test_bad_input_is_refused_by_name() -> None:
    for bad in (np.nan, -1.0, np.inf):
        with pytest.raises(FedsplitError, match=r"times_s\[1\]"):
            balanced_groups([1.0, bad], 1)
    for n_groups in (0, 3):
        with pytest.raises(FedsplitError, match="n_groups"):
            balanced_groups([1.0, 2.0], n_groups)
    with pytest.raises(FedsplitError, match="devices=20"):
        exact_groups(np.ones(20), 2)


def test_the_bound_knows_that_two_of_the_slowest_share_a_group() -> None:
    """Three equal devices in two groups: half of their sum is no bound that can be reached."""
    grouping = balanced_groups([3.0, 3.0, 3.0], 2)
    assert grouping.makespan_s == grouping.bound_s == 6.0
    assert balanced_groups([5.0, 1.0], 2).bound_s == 5.0
