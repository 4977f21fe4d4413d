"""Pools are divided so that nobody can be helped without hurting somebody who is no better off."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from fedsplit.errors import FedsplitError
from fedsplit.planning.bandwidth import (
    equal_shares,
    evaluate_shares,
    minmax_shares,
)
from fedsplit.planning.errors import InfeasibleError
from fedsplit.planning.pools import LinearPool, ShannonPool, shannon_bps
from tests.planning.planning_scenarios import conic_longest_s, mobile_band, shared_pools


@settings(max_examples=150)
@given(shared_pools())
def test_minmax_is_feasible_certified_and_no_worse_than_equal_shares(problem) -> None:
    pools, fixed = problem
    found = minmax_shares(pools, fixed)
    for pool, share in zip(pools, found.shares, strict=True):
        assert (share >= 0).all()
        assert share.sum() <= pool.budget * (1 + 1e-12)
    np.testing.assert_allclose(
        found.delay_s, evaluate_shares(pools, found.shares, fixed).delay_s, rtol=1e-12
    )
    assert found.objective_s == found.delay_s.max()
    assert found.gap <= 1e-10
    assert found.objective_s <= equal_shares(pools, fixed).objective_s * (1 + 1e-10)


@settings(max_examples=60)
@given(shared_pools(), st.integers(0, 2**32))
def test_no_other_division_passes_the_bound(problem, seed: int) -> None:
    pools, fixed = problem
    rng = np.random.default_rng(seed)
    longest = minmax_shares(pools, fixed)
    other = evaluate_shares(
        pools,
        tuple(
            _disturbed(share, pool.budget, rng)
            for share, pool in zip(longest.shares, pools, strict=True)
        ),
        fixed,
    )
    assert other.objective_s >= longest.bound_s * (1 - 1e-12)


def _disturbed(share: np.ndarray, budget: float, rng: np.random.Generator) -> np.ndarray:
    moved = share * rng.uniform(0.5, 1.5, len(share))
    return moved * budget / moved.sum() if moved.any() else moved


def _needed_hz(rate_bps: np.ndarray, snr_hz: np.ndarray) -> np.ndarray:
    """Return the band in which each user has its rate, by bisection of its logarithm."""
    low, high = np.full(rate_bps.shape, -50.0), np.full(rate_bps.shape, 100.0)
    for _ in range(100):
        middle = (low + high) / 2
        enough = shannon_bps(np.exp(middle), snr_hz) >= rate_bps
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.exp(high)


@pytest.mark.parametrize("n_users", [1, 7, 300])
def test_one_band_equals_bisection_on_the_delay(n_users: int) -> None:
    pool, fixed = mobile_band(n_users, seed=1)

    def excess(limit_s: float) -> float:
        return _needed_hz(pool.bits / (limit_s - fixed), pool.snr_hz).sum() - pool.budget

    least = (fixed + pool.bits * np.log(2) / pool.snr_hz).max()
    expected = brentq(excess, least * (1 + 1e-9), 1e4 * least, xtol=1e-14, rtol=1e-14)
    assert minmax_shares([pool], fixed).objective_s == pytest.approx(expected, rel=1e-11)


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.parametrize("n_users", [5, 30, 100])
def test_one_band_equals_a_conic_solver(n_users: int) -> None:
    pool, fixed = mobile_band(n_users, seed=n_users)
    expected = conic_longest_s([pool], fixed)
    assert minmax_shares([pool], fixed).objective_s == pytest.approx(expected, rel=1e-8)


def test_prices_are_what_more_budget_saves() -> None:
    band, fixed = mobile_band(20, seed=3)
    server = LinearPool(np.linspace(1e9, 5e9, 20), 1e11)
    found = minmax_shares([band, server], fixed)
    wider = ShannonPool(band.bits, band.snr_hz, band.budget * (1 + 1e-5))
    faster = LinearPool(server.work, server.budget * (1 + 1e-5))
    for pools, price, budget in (
        ([wider, server], found.prices[0], band.budget),
        ([band, faster], found.prices[1], server.budget),
    ):
        saved = found.objective_s - minmax_shares(pools, fixed).objective_s
        assert saved == pytest.approx(price * budget * 1e-5, rel=1e-3)


@pytest.mark.parametrize("snr_db", [-140, -60, -30, 0, 60])
def test_the_bound_holds_at_any_signal_strength(snr_db: int) -> None:
    band_hz, rng = 1e6, np.random.default_rng(0)
    pool = ShannonPool([1e3, 3e3, 2e3], 10 ** (snr_db / 10) * band_hz * np.arange(1, 4), band_hz)
    found = minmax_shares([pool])
    assert found.gap <= 1e-9
    for _ in range(100):
        other = evaluate_shares([pool], (_disturbed(found.shares[0], band_hz, rng),))
        assert other.objective_s >= found.bound_s * (1 - 1e-14)


def test_pools_without_common_users_are_separate_problems() -> None:
    first = ShannonPool([1e6, 2e6, 0, 0], [1e7, 1e6, 1e6, 1e6], 1e6)
    second = ShannonPool([0, 0, 5e6, 1e6], [1e6, 1e6, 1e5, 1e7], 1e6)
    alone = [minmax_shares([pool]).objective_s for pool in (first, second)]
    found = minmax_shares([first, second])
    assert found.objective_s == pytest.approx(max(alone), rel=1e-12)
    np.testing.assert_allclose(found.delay_s, np.repeat(alone, 2), rtol=1e-10)
    assert found.gap <= 1e-10


def test_a_user_that_sends_nothing_takes_nothing_and_may_still_be_last() -> None:
    pool = ShannonPool([1e6, 0.0], [1e7, 1e7], 1e6)
    found = minmax_shares([pool], [0.0, 100.0])
    assert found.shares[0].tolist() == [1e6, 0.0]
    assert found.objective_s == found.bound_s == 100.0


def test_ten_thousand_users_are_certified() -> None:
    pool, fixed = mobile_band(10_000, seed=0)
    assert minmax_shares([pool], fixed).gap <= 1e-10


def test_a_band_of_zero_width_and_a_dead_channel_are_infeasible() -> None:
    with pytest.raises(InfeasibleError, match=r"uplink: budget is 0.* needs 3 bit, has 0 bit"):
        ShannonPool([1.0, 2.0], [1.0, 1.0], 0.0, "uplink")
    with pytest.raises(InfeasibleError, match=r"uplink: user 1 has no channel gain.* 2 bit"):
        ShannonPool([1.0, 2.0], [1.0, 0.0], 1e6, "uplink")


@pytest.mark.parametrize("bad", [np.nan, -1.0, np.inf])
def test_bad_numbers_are_refused_by_name(bad: float) -> None:
    with pytest.raises(FedsplitError, match=r"band bits\[1\]"):
        ShannonPool([1.0, bad], [1.0, 1.0], 1e6)
    with pytest.raises(FedsplitError, match=r"band snr_hz\[0\]"):
        ShannonPool([1.0, 1.0], [bad, 1.0], 1e6)
    with pytest.raises(FedsplitError, match="server budget"):
        LinearPool([1.0], bad)
    with pytest.raises(FedsplitError, match="fixed_s"):
        minmax_shares([LinearPool([1.0], 1.0)], [bad])


def test_pools_for_different_users_are_refused() -> None:
    with pytest.raises(FedsplitError, match="users"):
        minmax_shares([LinearPool([1.0], 1.0), LinearPool([1.0, 2.0], 1.0)])
