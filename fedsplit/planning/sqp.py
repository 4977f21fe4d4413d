"""Division of pools by sequential quadratic programming, SFT's own method for its spectrum."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from fedsplit.arrays import Array
from fedsplit.errors import FedsplitError
from fedsplit.planning.bandwidth import Allocation, equal_shares, evaluate_shares
from fedsplit.planning.errors import checked
from fedsplit.planning.pools import Pool


def minmax_shares_sqp(
    pools: Sequence[Pool], fixed_s: ArrayLike = 0.0, *, tolerance: float = 1e-12
) -> Allocation:
    """Solve the problem of `bandwidth.minmax_shares` with SLSQP.

    ``min tau`` subject to ``delay_k(shares) <= tau`` and ``sum_k share_jk <= budget_j`` (papers'
    section 2 (c)), from equal shares. Work grows with the cube of the number of users; kept beside
    the exact method to reproduce the paper and to check one against the other.

    Parameters
    ----------
    pools, fixed_s
        As in `bandwidth.minmax_shares`.
    tolerance : float
        Relative precision at which SLSQP stops.

    Raises
    ------
    FedsplitError
        If SLSQP finds no feasible division.
    """
    start = equal_shares(pools, fixed_s)
    n_users = len(start.delay_s)
    fixed = checked("fixed_s", fixed_s, (n_users,))
    where = [np.flatnonzero(share > 0) for share in start.shares]
    sizes = [len(users) for users in where]
    edges = np.cumsum([1, *sizes])
    unit = start.objective_s
    if not any(sizes):
        return start

    def shares_of(x: Array) -> list[Array]:
        found = []
        for j, pool in enumerate(pools):
            share = np.zeros(n_users)
            share[where[j]] = np.maximum(x[edges[j] : edges[j + 1]], 1e-12) * pool.budget / sizes[j]
            found.append(share)
        return found

    def slack(x: Array) -> Array:
        total = fixed + sum(
            pool.delay_s(share) for pool, share in zip(pools, shares_of(x), strict=True)
        )
        result: Array = x[0] - total / unit
        return result

    def slack_jacobian(x: Array) -> Array:
        jacobian = np.zeros((n_users, edges[-1]))
        jacobian[:, 0] = 1.0
        for j, (pool, share) in enumerate(zip(pools, shares_of(x), strict=True)):
            users = where[j]
            slope = pool.curve(np.log(pool.scale[users] / share[users])).slope
            jacobian[users, edges[j] + np.arange(sizes[j])] = (
                pool.delay_s(share)[users] * slope / (unit * x[edges[j] : edges[j + 1]])
            )
        return jacobian

    totals = np.zeros((len(pools), edges[-1]))
    for j, size in enumerate(sizes):
        totals[j, edges[j] : edges[j + 1]] = 1.0 / max(size, 1)
    gradient = np.zeros(edges[-1])
    gradient[0] = 1.0
    result = minimize(
        lambda x: x[0],
        np.ones(edges[-1]),
        jac=lambda x: gradient,
        bounds=[(0, None)] + [(1e-6, None)] * (edges[-1] - 1),
        constraints=[
            {"type": "ineq", "fun": slack, "jac": slack_jacobian},
            {"type": "ineq", "fun": lambda x: 1.0 - totals @ x, "jac": lambda x: -totals},
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": tolerance},
    )
    if not np.isfinite(result.x).all() or (totals @ result.x > 1 + 1e-6).any():
        raise FedsplitError(f"SLSQP: {result.message}")
    found = tuple(
        share * (pool.budget / max(pool.budget, share.sum()))
        for pool, share in zip(pools, shares_of(result.x), strict=True)
    )
    return evaluate_shares(pools, found, fixed_s)
