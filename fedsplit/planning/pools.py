"""What users share: a band of the spectrum, a server's clock; and the delay a share buys.

With ``u = ln(scale / share)`` the delay of every pool is ``c G(e^u)`` and the share it
takes ``s e^-u``. Both are log-convex in `u`, so planning problems over pools are smooth and convex
in these logarithms, and Newton's method settles them in some ten steps whatever their units.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from fedsplit.arrays import Array
from fedsplit.planning.errors import InfeasibleError, checked

LN2 = float(np.log(2.0))
_POOR = 1e-3


@dataclass(frozen=True, eq=False)
class Curve:
    """The delay factor G at ``x = e^u`` and what Newton's method needs of it.

    Parameters
    ----------
    gain : ndarray
        G.
    slope : ndarray
        ``d ln G / du``.
    marginal : ndarray
        ``ln(dG/du) + u``: the logarithm of what one more unit of share saves, up to constants.
    curvature : ndarray
        Derivative of `marginal` with respect to `u`.
    """

    gain: Array
    slope: Array
    marginal: Array
    curvature: Array


class Pool(Protocol):
    """A divisible resource of `budget` units that users hold shares of.

    User `k` with share ``s_k e^-u`` waits ``c_k G(e^u)`` seconds, `c` being `seconds` and `s`
    being `scale`, both of shape ``[K]``; ``c_k = 0`` marks a user that does not need the pool.
    """

    @property
    def name(self) -> str: ...

    @property
    def budget(self) -> float: ...

    @property
    def seconds(self) -> Array: ...

    @property
    def scale(self) -> Array: ...

    def curve(self, u: Array) -> Curve:
        """Return the delay factor and its derivatives at `u`."""
        ...

    def delay_s(self, share: Array) -> Array:
        """Return how long each user waits with `share`, shape ``[K]``; 0 for idle users."""
        ...


@dataclass(frozen=True, eq=False)
class ShannonPool:
    """A band in which each user puts all its power in its share (FDMA).

    Rate ``b log2(1 + snr_hz / b)``; it never exceeds ``snr_hz / ln 2`` however wide the share
    (papers' sections 2 (b) and 3 (b)).

    Parameters
    ----------
    bits : array_like
        What each user sends, bit, shape ``[K]``.
    snr_hz : array_like
        ``gain * power / noise density`` of each user, Hz, shape ``[K]``.
    budget : float
        The band, Hz.
    name : str
        For errors.

    Raises
    ------
    InfeasibleError
        If a user that sends has no gain, or users send and there is no band.
    FedsplitError
        If a value is NaN, negative or infinite.
    """

    bits: Array
    snr_hz: Array
    budget: float
    name: str = "band"

    def __post_init__(self) -> None:
        bits = checked(f"{self.name} bits", np.atleast_1d(self.bits))
        snr = checked(f"{self.name} snr_hz", self.snr_hz, bits.shape)
        _check_budget(self.name, bits, self.budget, "bit")
        deaf = np.flatnonzero((bits > 0) & (snr == 0))
        if len(deaf):
            raise InfeasibleError(
                f"{self.name}: user {deaf[0]} has no channel gain, what it can send",
                bits[deaf[0]],
                0,
                "bit",
            )
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "snr_hz", snr)

    @cached_property
    def seconds(self) -> Array:
        """Delay of each user at its rate limit, that of unlimited bandwidth."""
        return np.divide(self.bits * LN2, self.snr_hz, out=np.zeros_like(self.bits),
                         where=self.bits > 0)  # fmt: skip

    @cached_property
    def scale(self) -> Array:
        """Share at which each user's signal-to-noise ratio is 1."""
        return self.snr_hz

    def curve(self, u: Array) -> Curve:
        """Return `shannon_curve`."""
        return shannon_curve(u)

    def delay_s(self, share: Array) -> Array:
        """Return bits over rate, shape ``[K]``."""
        return np.divide(self.bits, shannon_bps(share, self.snr_hz),
                         out=np.zeros_like(self.bits), where=self.bits > 0)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LinearPool:
    """A resource that serves each user in proportion to its share.

    A server's clock (`work` in FLOP, `budget` in FLOP/s), or a downlink whose station spreads its
    power evenly (`work` in bits per bit/s/Hz, that is Hz s, `budget` in Hz).

    Parameters
    ----------
    work : array_like
        What each user needs, in `budget` units times seconds, shape ``[K]``.
    budget : float
        The whole resource.
    name : str
        For errors.

    Raises
    ------
    InfeasibleError
        If there is work and no budget.
    FedsplitError
        If a value is NaN, negative or infinite.
    """

    work: Array
    budget: float
    name: str = "server"

    def __post_init__(self) -> None:
        work = checked(f"{self.name} work", np.atleast_1d(self.work))
        _check_budget(self.name, work, self.budget, "units")
        object.__setattr__(self, "work", work)

    @cached_property
    def seconds(self) -> Array:
        """Delay of each user if it had the whole resource."""
        return self.work / self.budget if self.budget > 0 else self.work

    @cached_property
    def scale(self) -> Array:
        """The whole resource."""
        return np.full(len(self.work), self.budget)

    def curve(self, u: Array) -> Curve:
        """Return ``G(x) = x``."""
        return Curve(np.exp(u), np.ones_like(u), 2 * u, np.full_like(u, 2.0))

    def delay_s(self, share: Array) -> Array:
        """Return work over share, shape ``[K]``."""
        with np.errstate(divide="ignore"):
            return np.divide(self.work, share, out=np.zeros_like(self.work), where=self.work > 0)


def shannon_bps(bandwidth_hz: ArrayLike, snr_hz: ArrayLike) -> Array:
    """Return ``b log2(1 + snr_hz / b)``, any shapes that broadcast; 0 for no bandwidth."""
    band, snr = np.broadcast_arrays(
        np.asarray(bandwidth_hz, dtype=np.float64), np.asarray(snr_hz, dtype=np.float64)
    )
    used = band > 0
    ratio = np.divide(snr, band, out=np.zeros(band.shape), where=used)
    rate: Array = band * np.log1p(ratio) / LN2
    return rate


def shannon_curve(u: Array) -> Curve:
    """Return ``G(x) = x / ln(1 + x)``, `x` being the signal-to-noise ratio."""
    x = np.exp(u)
    log = np.log1p(x)
    inverse = 1.0 / (1.0 + x)
    # ln(1 + x) - x / (1 + x), whose terms cancel for poor signals: there by its series.
    rise = log - x * inverse
    if x.size and x.min() < _POOR:
        series = x * x * (1 / 2 - x * (2 / 3 - x * (3 / 4 - x * (4 / 5 - x * (5 / 6)))))
        rise = np.where(x < _POOR, series, rise)
    slope = rise / log
    rest = 1.0 - slope
    return Curve(
        x / log,
        slope,
        2 * u + np.log(slope / log),
        1.0 + slope - rest * (inverse - rest) / slope,
    )


def _check_budget(name: str, work: Array, budget: float, unit: str) -> None:
    checked(f"{name} budget", budget)
    if budget == 0 and work.any():
        raise InfeasibleError(f"{name}: budget is 0, what it can carry", work.sum(), 0, unit)
