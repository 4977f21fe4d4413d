"""FedsLLM: learning accuracy and two bands for the least total training delay.

Federated split learning for LLMs (arXiv 2407.09250; model of Yang et al., arXiv 2007.03462, as
re-derived in papers' section 3). In a round every client runs local iterations until its local
problem is solved to accuracy eta, sends smashed data to the main server over one band and its
adapters to the federated server over another. A coarse eta makes rounds short and many, a fine one
long and few. Delay falls with clock and power, so both are at their maximum and enter as the
compute times and signal strengths that they give.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from fedsplit.arrays import Array
from fedsplit.errors import require, require_choice
from fedsplit.planning.bandwidth import Allocation, equal_shares, minmax_shares
from fedsplit.planning.errors import checked
from fedsplit.planning.pools import Pool, ShannonPool

SMASHED_PER = ("round", "iteration")
# Range in which eta is searched; beyond it rounds or iterations grow without limit.
_FINEST, _COARSEST = 1e-12, 1 - 1e-6


@dataclass(frozen=True)
class LearningCurve:
    """How local accuracy costs iterations, and saves rounds.

    ``v log2(1 / eta)`` local iterations reach local accuracy `eta`, and ``a / (1 - eta)`` rounds
    then reach the target.

    Parameters
    ----------
    iterations : float
        v, local iterations that halve the local error.
    rounds : float
        a, rounds needed if local problems were solved exactly.

    Raises
    ------
    FedsplitError
        If a value is NaN or not positive.
    """

    iterations: float
    rounds: float

    def __post_init__(self) -> None:
        checked("iterations", self.iterations, positive=True)
        checked("rounds", self.rounds, positive=True)

    def local_iterations(self, accuracy: float) -> float:
        """Return the local iterations of a round at local accuracy `accuracy`."""
        return float(self.iterations * np.log2(1 / accuracy))

    def global_rounds(self, accuracy: float) -> float:
        """Return the rounds at local accuracy `accuracy`."""
        return self.rounds / (1 - accuracy)

    @classmethod
    def from_constants(
        cls, smoothness: float, convexity: float, step: float, xi: float, target: float
    ) -> "LearningCurve":
        """Return the curve of the convergence proof for a smooth, strongly convex loss.

        ``v = 2 / ((2 - L delta) delta gamma)``, ``a = 2 L^2 / (gamma^2 xi) ln(1 / eps)`` with
        smoothness L, convexity gamma, step delta, and target accuracy eps.

        Raises
        ------
        FedsplitError
            If a constant is not positive, ``L delta >= 2`` or ``eps >= 1``.
        """
        for name, value in (
            ("smoothness", smoothness),
            ("convexity", convexity),
            ("step", step),
            ("xi", xi),
            ("target", target),
        ):
            checked(name, value, positive=True)
        require(smoothness * step < 2, "step", step, f"below {2 / smoothness:g}")
        require(target < 1, "target", target, "below 1")
        return cls(
            2 / ((2 - smoothness * step) * step * convexity),
            2 * smoothness**2 / (convexity**2 * xi) * float(np.log(1 / target)),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class FedsllmProblem:
    """A fleet that trains with FedsLLM; arrays have shape ``[K]``, scalars are repeated.

    Parameters
    ----------
    device_s, server_s : array_like
        Compute time of one local iteration on the client and on the main server, at full clock.
    smashed_bits : array_like
        Smashed data to the main server in each round or iteration, see `smashed_per`.
    adapter_bits : array_like
        Client-side adapters to the federated server in each round.
    main_snr_hz, fed_snr_hz : array_like
        ``gain * power / noise density`` to either server at full power, Hz.
    main_hz, fed_hz : float
        The two bands.
    learning : LearningCurve
        Iterations and rounds.
    smashed_per : str
        "round" charges the smashed data once a round, as the paper does; "iteration" as often as it
        is really sent.

    Raises
    ------
    InfeasibleError
        If a client has no channel gain, or there is no band.
    FedsplitError
        If a value is NaN or negative.
    """

    device_s: ArrayLike
    smashed_bits: ArrayLike
    adapter_bits: ArrayLike
    main_snr_hz: Array
    fed_snr_hz: Array
    main_hz: float
    fed_hz: float
    learning: LearningCurve
    server_s: ArrayLike = 0.0
    smashed_per: str = "round"

    def __post_init__(self) -> None:
        require_choice("smashed_per", self.smashed_per, SMASHED_PER)
        shape = np.atleast_1d(self.main_snr_hz).shape
        for name in (
            "device_s", "server_s", "smashed_bits", "adapter_bits", "main_snr_hz", "fed_snr_hz",
        ):  # fmt: skip
            object.__setattr__(self, name, checked(name, getattr(self, name), shape))
        self.round_at(0.5)

    def round_at(self, accuracy: float) -> tuple[list[Pool], Array]:
        """Return what a round at this local accuracy sends, and its compute time ``[K]``."""
        iterations = self.learning.local_iterations(accuracy)
        times = iterations if self.smashed_per == "iteration" else 1.0
        smashed, adapters = np.asarray(self.smashed_bits) * times, np.asarray(self.adapter_bits)
        compute = iterations * (np.asarray(self.device_s) + np.asarray(self.server_s))
        return [
            ShannonPool(smashed, self.main_snr_hz, self.main_hz, "main band"),
            ShannonPool(adapters, self.fed_snr_hz, self.fed_hz, "federated band"),
        ], compute


@dataclass(frozen=True, eq=False, kw_only=True)
class FedsllmPlan:
    """Learning accuracy and bands.

    Parameters
    ----------
    accuracy : float
        Local accuracy eta.
    local_iterations, rounds : float
        Local iterations per round and number of rounds (not rounded).
    main_hz, fed_hz : ndarray
        Share of each client in the two bands, shape ``[K]``.
    round_s, total_s : float
        Delay of a round and of the whole training.
    allocation_gap : float
        Certified relative distance of the bands' division from the best at this accuracy.
    """

    accuracy: float
    local_iterations: float
    rounds: float
    main_hz: Array
    fed_hz: Array
    round_s: float
    total_s: float
    allocation_gap: float


def plan_fedsllm(
    problem: FedsllmProblem, accuracy: float | None = None, *, equal_bandwidth: bool = False
) -> FedsllmPlan:
    """Minimise the total training delay over learning accuracy and both bands.

    With the local iterations n of a round as variable, the logarithm of the total delay is convex
    in ``ln n`` once the bands are divided in the best way, so one bounded search finds the optimum.
    The bands' division, and with it how each client's time is split between its two links, is
    exact at every step.

    Parameters
    ----------
    problem : FedsllmProblem
        The fleet.
    accuracy : float, optional
        Keep eta at this value, above 0 and below 1 (the papers' "FE" with 0.5).
    equal_bandwidth : bool
        Keep equal shares (the papers' "EB"); with ``accuracy=0.1`` the unoptimised scheme.

    Raises
    ------
    FedsplitError
        If `accuracy` is outside (0, 1).
    """
    divide = equal_shares if equal_bandwidth else minmax_shares
    curve = problem.learning

    def solve(eta: float) -> tuple[float, Allocation]:
        found = divide(*problem.round_at(eta))
        return curve.global_rounds(eta) * found.objective_s, found

    def eta_of(log_iterations: float) -> float:
        return float(np.exp2(-np.exp(log_iterations) / curve.iterations))

    if accuracy is None:
        bounds = [
            float(np.log(curve.local_iterations(eta))) for eta in (_COARSEST, _FINEST)
        ]  # fmt: skip
        search = minimize_scalar(
            lambda z: float(np.log(solve(eta_of(z))[0])),
            bounds=bounds,
            method="bounded",
            options={"xatol": 1e-6},
        )
        accuracy = eta_of(search.x)
    require(0 < accuracy < 1, "accuracy", accuracy, "above 0 and below 1")
    total, found = solve(accuracy)
    return FedsllmPlan(
        accuracy=accuracy,
        local_iterations=curve.local_iterations(accuracy),
        rounds=curve.global_rounds(accuracy),
        main_hz=found.shares[0],
        fed_hz=found.shares[1],
        round_s=found.objective_s,
        total_s=total,
        allocation_gap=found.gap,
    )
