"""SLSQP, the paper's method, finds the exact division of bands."""

import numpy as np
import pytest

from fedsplit.planning.bandwidth import minmax_shares
from fedsplit.planning.pools import LinearPool, ShannonPool
from fedsplit.planning.sqp import minmax_shares_sqp
from tests.planning.planning_scenarios import mobile_band


@pytest.mark.parametrize("n_users", [1, 5, 30])
def test_sqp_equals_the_exact_min_max(n_users: int) -> None:
    band, fixed = mobile_band(n_users, seed=n_users)
    downlink = LinearPool(np.linspace(1e5, 1e6, n_users), 20e6, "downlink")
    for pools in ([band], [band, downlink]):
        exact, found = minmax_shares(pools, fixed), minmax_shares_sqp(pools, fixed)
        assert found.objective_s == pytest.approx(exact.objective_s, rel=1e-6)
        assert found.objective_s >= exact.bound_s * (1 - 1e-12)
        for pool, share in zip(pools, found.shares, strict=True):
            assert share.sum() <= pool.budget * (1 + 1e-12)


def test_sqp_gives_idle_users_nothing() -> None:
    band = ShannonPool([1e6, 0.0, 2e6], [1e7, 1e7, 1e6], 1e6)
    assert minmax_shares_sqp([band]).shares[0][1] == 0
