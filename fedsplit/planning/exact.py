"""Where to cut every device of a round, exactly, for energy plus weighted delay.

Multi-client model splitting (Wei and Chen, arXiv 2608.17849). In an iteration all devices run their
part forward and send; the server serves them one after the other; then all receive and run
backward::

    T = max_n ahead[n, c_n] + sum_n server[n, c_n] + max_n behind[n, c_n]

Each device's own best cut can be far from the best, because one slow device hides what the others
do. But once both maxima are bounded by some T1 and T2, the devices are independent again, and only
values that occur need to be tried.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsplit.arrays import Array
from fedsplit.errors import require
from fedsplit.planning.errors import InfeasibleError, checked

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SplitProblem:
    """What every cut of every device takes; arrays have shape ``[N, C]``.

    Parameters
    ----------
    ahead_s : array_like
        Before the server: the device's forward pass and its uplink; infinite where a device cannot
        be cut.
    server_s : array_like
        On the server, which serves one device at a time.
    behind_s : array_like
        After the server: the downlink and the device's backward pass.
    energy_j : array_like
        Of the device and the server.
    delay_weight : float
        Joules that a second is worth, lambda; infinite counts delay alone, 0 energy alone.

    Raises
    ------
    InfeasibleError
        If a device has no cut that is possible.
    FedsplitError
        If a value is NaN or negative, or shapes differ.
    """

    ahead_s: ArrayLike
    server_s: ArrayLike
    behind_s: ArrayLike
    energy_j: ArrayLike
    delay_weight: float

    def __post_init__(self) -> None:
        shape = np.shape(self.ahead_s)
        require(len(shape) == 2 and min(shape) > 0, "ahead_s shape", shape, "(devices, cuts)")
        for name in ("ahead_s", "server_s", "behind_s", "energy_j"):
            value = checked(name, getattr(self, name), shape, infinite=name == "ahead_s")
            object.__setattr__(self, name, value)
        require(self.delay_weight >= 0, "delay_weight", self.delay_weight, "at least 0")
        stuck = np.flatnonzero(~np.isfinite(np.asarray(self.ahead_s)).any(axis=1))
        if len(stuck):
            raise InfeasibleError(f"possible cuts of device {stuck[0]}", 1, 0, "cuts")

    def delay_s(self, cut: ArrayLike) -> float:
        """Return T for one cut of each device, shape ``[N]``."""
        ahead, server, behind, _ = self._chosen(cut)
        return float(ahead.max() + server.sum() + behind.max())

    def energy_of(self, cut: ArrayLike) -> float:
        """Return E for one cut of each device, shape ``[N]``, J."""
        return float(self._chosen(cut)[3].sum())

    def objective(self, cut: ArrayLike) -> float:
        """Return ``E + lambda T`` in J, or T in s if delay alone counts."""
        per_joule, per_second = self.weights
        return per_joule * self.energy_of(cut) + per_second * self.delay_s(cut)

    @property
    def weights(self) -> tuple[float, float]:
        """What a joule and a second count in the objective."""
        return (0.0, 1.0) if np.isinf(self.delay_weight) else (1.0, self.delay_weight)

    def _chosen(self, cut: ArrayLike) -> tuple[Array, Array, Array, Array]:
        own = np.arange(np.shape(self.ahead_s)[0]), np.asarray(cut)
        ahead, server, behind, energy = (
            np.asarray(values)[own]
            for values in (self.ahead_s, self.server_s, self.behind_s, self.energy_j)
        )
        return ahead, server, behind, energy


@dataclass(frozen=True, eq=False)
class ExactSplit:
    """The best cuts.

    Parameters
    ----------
    cut : ndarray of int
        Cut of each device, shape ``[N]``.
    objective : float
        What it costs, as `SplitProblem.objective`.
    bound : float
        No cuts cost less; it equals `objective` but for rounding.
    delay_s, energy_j : float
        Its terms.
    """

    cut: Ints
    objective: float
    bound: float
    delay_s: float
    energy_j: float


def split_exactly(problem: SplitProblem) -> ExactSplit:
    """Minimise ``E + lambda T`` over a cut for each device, exactly, in ``O(N^2 C^2)``.

    For every value T2 of `behind_s`, ascending, the cuts that keep it are swept by `ahead_s`: each
    device takes the least of its own costs so far, and the sum of these plus the two maxima is a
    candidate. The sweep ends when T2 alone makes anything better impossible.

    Parameters
    ----------
    problem : SplitProblem
        The round.
    """
    ahead, behind = np.asarray(problem.ahead_s), np.asarray(problem.behind_s)
    per_joule, per_second = problem.weights
    own = per_joule * np.asarray(problem.energy_j) + per_second * np.asarray(problem.server_s)
    # Each device's cuts by time before the server; then all pairs by that time.
    order = np.argsort(ahead, axis=1, kind="stable")
    ahead, behind, own = (np.take_along_axis(x, order, axis=1) for x in (ahead, behind, own))
    sweep = np.argsort(ahead, axis=None, kind="stable")
    times = ahead.ravel()[sweep]
    first_s = float(ahead[:, 0].max())
    # Before T1 has reached every device's first cut there is no candidate, nor where none is.
    sweep, times = sweep[times < np.inf], times[times < np.inf]
    possible = np.isfinite(ahead)
    least_own = float(np.where(possible, own, np.inf).min(axis=1).sum())
    latest = np.unique(behind[possible])
    latest = latest[latest >= np.where(possible, behind, np.inf).min(axis=1).max()]
    best, where = np.inf, (np.inf, np.inf)
    for limit in latest.tolist():
        if least_own + per_second * (first_s + limit) >= best:
            break
        cost = np.minimum.accumulate(
            np.where(possible & (behind <= limit), own, np.inf), axis=1
        )  # fmt: skip
        known = np.isfinite(cost)
        filled = np.where(known, cost, 0.0)
        change = np.diff(filled, axis=1, prepend=0.0).ravel()[sweep]
        entering = np.diff(known, axis=1, prepend=False).ravel()[sweep]
        complete = int(np.searchsorted(np.cumsum(entering), len(own)))
        if complete == len(sweep):
            continue
        sums = np.cumsum(change)[complete:] + per_second * (times[complete:] + limit)
        index = int(sums.argmin())
        if sums[index] < best:
            best, where = float(sums[index]), (float(times[complete + index]), limit)
    allowed = possible & (ahead <= where[0]) & (behind <= where[1])
    chosen = np.where(allowed, own, np.inf).argmin(axis=1)
    cut: Ints = order[np.arange(len(order)), chosen]
    return ExactSplit(
        cut,
        problem.objective(cut),
        min(best, problem.objective(cut)),
        problem.delay_s(cut),
        problem.energy_of(cut),
    )
