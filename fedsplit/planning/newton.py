"""Newton's method for the division of pools among users; see `pools` for the variables."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.planning.pools import LN2, Curve, Pool, shannon_curve

_MAX_STEPS = 100
# In logarithms: no share changes by more than a factor of about 7 in one step.
_LONGEST_STEP = 2.0
# Convergence is quadratic: the error after a step of this size is at rounding level.
_CONVERGED = 1e-7
_PRICE_STEPS = 4

Users = NDArray[np.intp]


def _curves(pools: Sequence[Pool], u: Array) -> Curve:
    each = [pool.curve(row) for pool, row in zip(pools, u, strict=True)]
    return Curve(
        *(
            np.array([getattr(curve, name) for curve in each])
            for name in ("gain", "slope", "marginal", "curvature")
        )
    )


def equalising_shares(pools: Sequence[Pool], fixed_s: Array, users: Users) -> tuple[Array, Array]:
    """Return the shares that make the users' delays equal and use up every pool.

    This is the min-max division of pools that are linked by common users. Unknown are, in
    logarithms, the shares `u` ``[J, K]``, the users' weights ``[K]``, the pools' prices ``[J]`` and
    the longest delay. The conditions: every user saves as much by a unit of share as the pool's
    price says; all delays equal the longest; all pools are used up; the weights add up to 1. Shares
    and weights are eliminated user by user.

    Parameters
    ----------
    pools : sequence of Pool
        Pools, each needed by at least one of `users`.
    fixed_s : ndarray
        Delay of every user besides, s, shape ``[K]``.
    users : ndarray of int
        The users to serve, each of whom needs at least one pool.

    Returns
    -------
    shares : ndarray
        Shape ``[J, len(users)]``.
    weights : ndarray
        Multipliers of the users' delays, shape ``[len(users)]``; they add up to 1.
    """
    fixed = fixed_s[users]
    seconds = np.array([pool.seconds[users] for pool in pools])
    scale = np.array([pool.scale[users] for pool in pools])
    budget = np.array([pool.budget for pool in pools])
    active = seconds > 0
    n_pools, n_users = seconds.shape
    offset = np.log(np.where(active, seconds / scale, 1.0))
    scale = np.where(active, scale, 0.0)
    # Start: shares in proportion to the delays that an even division gives.
    even = np.divide(budget, active.sum(axis=1))[:, None]
    u = np.log(np.where(active, scale / even, 1.0))
    start = np.where(active, seconds * _curves(pools, u).gain, 0.0)
    u -= np.log(np.where(active, start / start.mean(axis=1, where=active, keepdims=True), 1.0))
    curve = _curves(pools, u)
    longest = np.log((fixed + (seconds * curve.gain).sum(axis=0)).max())
    weight = np.full(n_users, -np.log(n_users))
    price = (weight + offset + curve.marginal).mean(axis=1, where=active)
    system, right = np.empty((n_pools + 1, n_pools + 1)), np.empty(n_pools + 1)
    for _ in range(_MAX_STEPS):
        delays = seconds * curve.gain
        total = fixed + delays.sum(axis=0)
        elasticity = delays * curve.slope / total
        used = scale * np.exp(-u)
        spent = used.sum(axis=1)
        part = np.exp(weight)
        mismatch = np.where(active, weight + offset + curve.marginal - price[:, None], 0.0)
        late = longest - np.log(total)
        # weight step = own + reach . price step - lag * delay step
        reach = elasticity / curve.curvature
        lag = 1.0 / reach.sum(axis=0)
        own = -((reach * mismatch).sum(axis=0) + late) * lag
        reach = reach * lag
        use = used / (spent[:, None] * curve.curvature)
        part /= part.sum()
        system[:n_pools, :n_pools] = np.diag(use.sum(axis=1)) - use @ reach.T
        system[:n_pools, n_pools] = use @ lag
        system[n_pools, :n_pools] = reach @ part
        system[n_pools, n_pools] = -(lag @ part)
        right[:n_pools] = np.log(spent / budget) + (use * (mismatch + own)).sum(axis=1)
        right[n_pools] = -np.log(np.exp(weight).sum()) - own @ part
        try:
            step = np.linalg.solve(system, right)
        except np.linalg.LinAlgError:
            break  # The last division stands; its bound says how good it is.
        weight_step = own + step[:n_pools] @ reach - lag * step[n_pools]
        u_step = np.where(
            active, (step[:n_pools, None] - weight_step - mismatch) / curve.curvature, 0.0
        )
        size = float(np.abs(u_step).max())
        if not np.isfinite(size):
            break
        damping = min(1.0, _LONGEST_STEP / max(size, _LONGEST_STEP))
        u = u + damping * u_step
        weight = weight + damping * weight_step
        price = price + damping * step[:n_pools]
        longest = longest + damping * step[n_pools]
        if size < _CONVERGED:
            break
        curve = _curves(pools, u)
    shares = scale * np.exp(-u)
    part = np.exp(weight - weight.max())
    return shares * (budget / shares.sum(axis=1))[:, None], part / part.sum()


def least_priced_s(bits: Array, snr_hz: Array, weight: Array, price: float) -> Array:
    """Return ``min_b weight * delay(b) + price * b`` of Shannon links; all shapes broadcast.

    The share at which a user's weighted saving per hertz equals the price; this is how the best
    answer of each of many options to given prices is found.

    Parameters
    ----------
    bits : ndarray
        What is sent; 0 costs nothing.
    snr_hz : ndarray
        ``gain * power / noise density``, Hz.
    weight : ndarray
        Weight of the delay, above 0.
    price : float
        Price of a hertz, above 0.
    """
    seconds = weight * bits * LN2 / snr_hz
    used = seconds > 0
    wanted = np.log(np.divide(price * snr_hz, seconds, out=np.ones(seconds.shape), where=used))
    # The marginal is 2u - ln 2 for poor signals and 2u - ln u for good ones.
    u = np.maximum(wanted + LN2, wanted + np.log(np.maximum(wanted / 2, 1.0))) / 2
    for _ in range(_PRICE_STEPS):
        curve = shannon_curve(u)
        u = u - (curve.marginal - wanted) / curve.curvature
    result: Array = seconds * shannon_curve(u).gain + price * snr_hz * np.exp(-u)
    return np.where(used, result, 0.0)
