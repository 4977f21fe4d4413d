"""The division of bands by a conic solver, as an oracle."""

import warnings

import cvxpy
import numpy as np

from fedsplit.planning import ShannonPool, equal_shares


def conic_s(pools: list[ShannonPool], fixed_s: np.ndarray) -> float:
    """Return the least longest delay by Clarabel, in units of the equal-share delay."""
    users, unit_s = len(fixed_s), equal_shares(pools, fixed_s).objective_s
    longest, limits, spent = cvxpy.Variable(), [], fixed_s / unit_s
    for pool in pools:
        even_hz = pool.budget / users
        share, time_s = cvxpy.Variable(users), cvxpy.Variable(users)
        rate = -cvxpy.rel_entr(share, share + pool.snr_hz / even_hz) / np.log(2)
        bits = pool.bits / (even_hz * unit_s)
        limits += [
            cvxpy.multiply(bits, cvxpy.inv_pos(time_s)) <= rate,
            cvxpy.sum(share) <= users,
        ]
        spent = spent + time_s
    problem = cvxpy.Problem(cvxpy.Minimize(longest), [*limits, spent <= longest])
    with warnings.catch_warnings():
        # It says that it may not have reached these tolerances; the gap shows what it reached.
        warnings.simplefilter("ignore")
        problem.solve(
            solver="CLARABEL", tol_gap_rel=1e-11, tol_gap_abs=1e-11, tol_feas=1e-11
        )  # fmt: skip
    return float(longest.value) * unit_s
