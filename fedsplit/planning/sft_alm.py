"""SFT's own large-timescale method: augmented Lagrangian on the relaxed problem, then rounding."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from fedsplit.arrays import Array
from fedsplit.planning.sft import SftPlan, SftProblem, common_cuts, plan_large_timescale

_MAX_ROUNDS = 40
_FEASIBLE = 1e-6
_PENALTY = 10.0
_GROWTH = 4.0


@dataclass(frozen=True, eq=False)
class AlmResult:
    """What the augmented Lagrangian found.

    Parameters
    ----------
    plan : SftPlan
        After rounding the cut to a neighbour and choosing settings of the table for it.
    relaxed_ratio : ndarray
        Codec ratios of the relaxed problem, shape ``[N]``.
    relaxed_s : float
        Delay of a round in the relaxed problem.
    violation : float
        Largest relative violation of its constraints.
    """

    plan: SftPlan
    relaxed_ratio: Array
    relaxed_s: float
    violation: float


def plan_large_timescale_alm(problem: SftProblem) -> AlmResult:
    """Choose cut and codec settings as the paper does (papers' section 2 (c)).

    The relaxed problem has a real-valued cut, between whose neighbours costs are interpolated, and
    real-valued ratios with the loss on the table's convex hull. Its constraints (delay of each
    device, loss, memory) are moved to an augmented Lagrangian that a projected quasi-Newton method
    minimises, again and again with updated multipliers. The cut is then rounded to the better
    neighbour and the settings are chosen again for it.

    With blocks of equal cost the relaxed problem has one optimum. Otherwise the method may stop at
    a local one; it starts at the first, middle and last cut and keeps the best.

    Raises
    ------
    InfeasibleError
        As `plan_large_timescale`.
    """
    cuts = common_cuts(problem)
    relaxed = _Relaxed(problem, cuts)
    starts = np.unique(cuts[[0, len(cuts) // 2, -1]])
    results = [_from_start(problem, relaxed, cuts, int(start)) for start in starts]
    return min(results, key=lambda result: result.plan.round_s)


def _from_start(
    problem: SftProblem, relaxed: "_Relaxed", cuts: NDArray[np.int64], start: int
) -> AlmResult:
    plan = plan_large_timescale(problem, [start])
    x = np.concatenate([[plan.round_s / relaxed.unit_s], [float(start)], plan.ratio])
    multiplier, penalty = np.zeros(len(plan.ratio) + 2), _PENALTY
    violation = np.inf
    for _ in range(_MAX_ROUNDS):
        x = minimize(
            relaxed.augmented,
            x,
            (multiplier, penalty),
            "L-BFGS-B",
            jac=True,
            bounds=relaxed.bounds,
        ).x
        values = relaxed.constraints(x)
        multiplier = np.maximum(0.0, multiplier + penalty * values)
        worst = float(values.max())
        if worst > violation / 2:
            penalty *= _GROWTH
        violation = worst
        if worst < _FEASIBLE:
            break
    neighbours = 1 if x[1] == round(x[1]) else 2
    nearest = cuts[np.argsort(np.abs(cuts - x[1]), kind="stable")[:neighbours]]
    return AlmResult(
        plan_large_timescale(problem, nearest),
        x[2:],
        float(x[0] * relaxed.unit_s),
        max(violation, 0.0),
    )


class _Relaxed:
    """The relaxed problem in ``x = (delay / unit, cut, ratios)``.

    Constraints, at most 0: each device's delay, the loss, the memory; all without unit.
    """

    def __init__(self, problem: SftProblem, cuts: NDArray[np.int64]) -> None:
        self._hull = hull = problem.table.hull()
        self._weights = problem.shares_of_data
        self._limit = problem.max_loss_increase
        self._fixed, self._per_ratio = problem.delay_terms()
        self._memory = problem.costs.memory_bytes
        self._available = float(np.min(np.asarray(problem.devices.memory_bytes)))
        middle = int(cuts[len(cuts) // 2])
        self.unit_s = float((self._fixed + self._per_ratio)[:, middle].max())
        self._loss_unit = max(float(np.ptp(hull.loss_increase)), 1e-12)
        self._loss_slope = np.append(np.diff(hull.loss_increase) / np.diff(hull.ratio), 0.0)
        self.bounds = [(0.0, None), (float(cuts[0]), float(cuts[-1]))]
        self.bounds += [(float(hull.ratio[0]), float(hull.ratio[-1]))] * len(self._fixed)

    def constraints(self, x: Array) -> Array:
        """Return the constraints' values."""
        (base, _), (rate, _), (size, _) = self._at(x[1])
        loss = self._weights @ np.interp(x[2:], self._hull.ratio, self._hull.loss_increase)
        return np.concatenate(
            [
                (base + rate * x[2:]) / self.unit_s - x[0],
                [(loss - self._limit) / self._loss_unit],
                [size / self._available - 1],
            ]
        )

    def augmented(self, x: Array, multiplier: Array, penalty: float) -> tuple[float, Array]:
        """Return the augmented Lagrangian and its gradient."""
        force = np.maximum(0.0, multiplier + penalty * self.constraints(x))
        delay, accuracy, room = force[:-2] / self.unit_s, force[-2] / self._loss_unit, force[-1]
        (_, base_slope), (rate, rate_slope), (_, size_slope) = self._at(x[1])
        piece = np.searchsorted(self._hull.ratio, x[2:], side="right") - 1
        gradient = np.empty_like(x)
        gradient[0] = 1.0 - force[:-2].sum()
        gradient[1] = delay @ (base_slope + rate_slope * x[2:])
        gradient[1] += room * size_slope / self._available
        gradient[2:] = delay * rate + accuracy * self._weights * self._loss_slope[piece]
        return float(x[0] + (force @ force - multiplier @ multiplier) / (2 * penalty)), gradient

    def _at(self, cut: float) -> tuple[tuple[Array, Array], ...]:
        """Return fixed delay, delay per ratio and memory at a real-valued cut, with slopes."""
        last = len(self._memory) - 1
        left = min(int(cut), max(last - 1, 0))
        right, part = min(left + 1, last), cut - left
        return tuple(
            (values[..., left] * (1 - part) + values[..., right] * part,
             values[..., right] - values[..., left])
            for values in (self._fixed, self._per_ratio, self._memory)
        )  # fmt: skip
