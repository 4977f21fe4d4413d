"""Exact division of bands and clocks among users that work at the same time.

Users may need several pools one after the other (a band to the main server, another to the
federated server, a downlink, a server's clock) and have a fixed delay besides. In the logarithms of
`pools.Pool` these are smooth convex problems whose optimality conditions have arrow shape, so that
one step of Newton's method costs one vectorised pass over the users.

The results carry a bound that does not depend on how they were found, so that a caller can see the
optimality of each one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsplit.arrays import Array
from fedsplit.errors import require
from fedsplit.planning.errors import checked
from fedsplit.planning.newton import equalising_shares
from fedsplit.planning.pools import Pool


@dataclass(frozen=True, eq=False, kw_only=True)
class Allocation:
    """Shares of pools, and how good they are.

    Parameters
    ----------
    shares : tuple of ndarray
        Share of each user in each pool, each of shape ``[K]``; 0 for users that do not need it.
    delay_s : ndarray
        Delay of each user with these shares, fixed delay included, shape ``[K]``.
    objective_s : float
        The longest delay, as reached.
    bound_s : float
        No division of the pools does better than this.
    weights : ndarray
        By how much a user's delay counts (its multiplier in the longest delay; adds up to 1),
        shape ``[K]``.
    prices : ndarray
        Seconds of the objective that one more unit of each pool saves, shape ``[J]``.
    """

    shares: tuple[Array, ...]
    delay_s: Array
    objective_s: float
    bound_s: float
    weights: Array
    prices: Array

    @property
    def gap(self) -> float:
        """Relative distance from the bound, at least 0."""
        if self.objective_s == 0:
            return 0.0
        return max(0.0, 1.0 - self.bound_s / self.objective_s)


def evaluate_shares(
    pools: Sequence[Pool], shares: tuple[Array, ...], fixed_s: ArrayLike = 0.0
) -> Allocation:
    """Return what given shares yield; the bound is only that of the fixed delays.

    Parameters as in `minmax_shares`; `shares` has one array of shape ``[K]`` for each pool.
    """
    fixed = _check_users(pools, fixed_s)
    delay = _delays(pools, shares, fixed)
    weights = np.zeros(len(fixed))
    weights[delay.argmax()] = 1.0
    return Allocation(
        shares=shares,
        delay_s=delay,
        objective_s=float(delay.max()),
        bound_s=float(fixed.max()),
        weights=weights,
        prices=np.zeros(len(pools)),
    )


def equal_shares(pools: Sequence[Pool], fixed_s: ArrayLike = 0.0) -> Allocation:
    """Give every user that needs a pool the same share of it (the papers' "EB").

    Parameters and errors as in `minmax_shares`; the result as in `evaluate_shares`.
    """
    return evaluate_shares(pools, tuple(_equal(pool) for pool in pools), fixed_s)


def minmax_shares(pools: Sequence[Pool], fixed_s: ArrayLike = 0.0) -> Allocation:
    """Divide the pools so that the user who finishes last finishes as early as possible.

    ``min max_k fixed_k + sum_j delay_jk(share_jk)`` subject to ``sum_k share_jk <= budget_j``.

    Parameters
    ----------
    pools : sequence of Pool
        What is shared; a user waits for one after the other.
    fixed_s : array_like
        Delay of each user besides, s, scalar or shape ``[K]``.

    Returns
    -------
    Allocation
        With ``objective_s`` the longest delay.

    Raises
    ------
    FedsplitError
        If the pools are for different numbers of users, or a delay is NaN or negative.
    """
    fixed = _check_users(pools, fixed_s)
    shares = [np.zeros(len(fixed)) for _ in pools]
    needs = np.array([pool.seconds > 0 for pool in pools])
    parts = []
    # Pools without a common user are separate problems; the slowest of them decides.
    for members in _connected(needs):
        users = np.flatnonzero(needs[members].any(axis=0))
        part, weight = equalising_shares([pools[j] for j in members], fixed, users)
        for j, share in zip(members, part, strict=True):
            shares[j][users] = share
        parts.append((users, weight))
    delay = _delays(pools, shares, fixed)
    weights = np.zeros(len(fixed))
    weights[fixed.argmax()] = 1.0
    if parts:
        users, weight = max(parts, key=lambda part: float(delay[part[0]].max()))
        if delay[users].max() > fixed.max():
            weights[:] = 0.0
            weights[users] = weight
    longest = float(delay.max())
    loss, prices = _tangent(pools, shares, weights)
    bound = max(float(fixed.max()), float(weights @ delay) - loss)
    return Allocation(
        shares=tuple(shares),
        delay_s=delay,
        objective_s=longest,
        bound_s=min(bound, longest),
        weights=weights,
        prices=prices,
    )


def _check_users(pools: Sequence[Pool], fixed_s: ArrayLike) -> Array:
    require(len(pools) > 0, "pools", len(pools), "at least one")
    counts = [len(pool.seconds) for pool in pools]
    require(min(counts) == max(counts), "pools users", counts, "the same number in every pool")
    require(counts[0] > 0, "pools users", 0, "at least one user")
    return np.array(checked("fixed_s", fixed_s, (counts[0],)))


def _equal(pool: Pool) -> Array:
    needed = pool.seconds > 0
    return np.where(needed, pool.budget / max(1, int(needed.sum())), 0.0)


def _connected(needs: NDArray[np.bool_]) -> list[list[int]]:
    """Return groups of pools (rows of `needs`) that are linked by common users."""
    groups: list[list[int]] = []
    for pool in range(len(needs)):
        if not needs[pool].any():
            continue
        linked = [
            group for group in groups if any((needs[pool] & needs[other]).any() for other in group)
        ]
        groups = [group for group in groups if group not in linked]
        groups.append(sorted([pool, *(index for group in linked for index in group)]))
    return groups


def _delays(pools: Sequence[Pool], shares: Sequence[Array], fixed_s: Array) -> Array:
    total = fixed_s.copy()
    for pool, share in zip(pools, shares, strict=True):
        total += pool.delay_s(share)
    return total


def _tangent(pools: Sequence[Pool], shares: Sequence[Array], weights: Array) -> tuple[float, Array]:
    """Return how far the weighted delay can lie above the optimum, and the pools' prices.

    Delays are convex in the shares, so their tangent bounds them from below. What the tangent
    gains by moving every pool to the user who saves most is the most that any division can gain.
    """
    loss, prices = 0.0, np.zeros(len(pools))
    for j, (pool, share) in enumerate(zip(pools, shares, strict=True)):
        users = np.flatnonzero(share > 0)
        if not len(users):
            continue
        held = share[users]
        slope = pool.curve(np.log(pool.scale[users] / held)).slope
        saving = weights[users] * pool.delay_s(share)[users] * slope / held
        prices[j] = saving.max()
        loss += prices[j] * pool.budget - float(saving @ held)
    return loss, prices
