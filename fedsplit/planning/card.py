"""CARD: where to cut and how fast to clock the server, for delay and server energy.

Cut layer and computing resource decision (arXiv 2412.00090); papers' section 5. Devices train one
after the other, each with the whole band. In the server's clock `f` the delay is
``base(c) + cycles(c) / f`` and the server's energy ``xi f^2 cycles(c)``, so that the best clock
does not depend on the cut.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsplit.arrays import Array
from fedsplit.errors import require
from fedsplit.planning.costs import CutCosts, Devices
from fedsplit.planning.errors import checked, checked_links


@dataclass(frozen=True)
class ServerClock:
    """A server whose clock can be chosen.

    Parameters
    ----------
    flops_per_cycle : float
        FLOPs per clock cycle over all cores (delta sigma).
    min_hz, max_hz : float
        Range of the clock.
    energy_coefficient : float
        ``xi`` of the power ``xi f^3``, W/Hz^3.

    Raises
    ------
    FedsplitError
        If a value is NaN or not positive, or the range is empty.
    """

    flops_per_cycle: float
    min_hz: float
    max_hz: float
    energy_coefficient: float

    def __post_init__(self) -> None:
        checked("energy_coefficient", self.energy_coefficient)
        for name in ("flops_per_cycle", "min_hz", "max_hz"):
            checked(name, getattr(self, name), positive=True)
        require(self.min_hz <= self.max_hz, "min_hz", self.min_hz, f"at most {self.max_hz:g}")


@dataclass(frozen=True, eq=False)
class CardPlan:
    """Cuts and clocks; every array has shape ``[N]``.

    Parameters
    ----------
    cut : ndarray of int
        Blocks on each device.
    server_hz : ndarray
        Clock of the server during each device's turn.
    delay_s : ndarray
        Delay of each turn.
    server_energy_j : ndarray
        Energy of the server in each turn.
    utility : ndarray
        Each device's part of what was minimised.
    """

    cut: NDArray[np.int64]
    server_hz: Array
    delay_s: Array
    server_energy_j: Array
    utility: Array


def plan_card(
    costs: CutCosts,
    devices: Devices,
    uplink_bps: ArrayLike,
    downlink_bps: ArrayLike,
    server: ServerClock,
    *,
    delay_weight: float,
    min_cut: int = 1,
    jointly: bool = False,
) -> CardPlan:
    """Minimise normalised delay and server energy over cut and clock, exactly.

    ``U = w (D - D_min) / (D_max - D_min) + (1 - w) (E - E_min) / (E_max - E_min)``, whose best
    clock is ``(w dE / (2 xi (1 - w) dD))^(1/3)``, clipped to the range, at every cut.

    The bounds are those of the allowed cuts: the delay between the best cut at the highest clock
    and the worst at the lowest, the energy between the least of cuts that use the server at the
    lowest clock and the most at the highest.

    Parameters
    ----------
    costs : CutCosts
        The model.
    devices : Devices
        Speed, memory and mini-batches of each device.
    uplink_bps, downlink_bps : array_like
        Rates with the whole band, scalar or shape ``[N]``.
    server : ServerClock
        The server.
    delay_weight : float
        w, 0 (energy only) to 1 (delay only).
    min_cut : int
        Least number of blocks on the device: 1 keeps raw embeddings private, 0 allows all cuts.
    jointly : bool
        Normalise the fleet's total delay and energy instead of each device's own: minimises one
        weighted sum over the whole round, with one clock.

    Raises
    ------
    InfeasibleError
        If a device cannot hold its smallest allowed part, or has no rate.
    FedsplitError
        If a value is NaN, negative or out of range.
    """
    require(0 <= delay_weight <= 1, "delay_weight", delay_weight, "0 to 1")
    shape = (len(devices),)
    bits = np.asarray(devices.steps) * costs.uplink_bits.min()
    up = checked_links("uplink_bps", uplink_bps, shape, bits)[:, None]
    down = checked_links("downlink_bps", downlink_bps, shape, bits)[:, None]
    allowed = devices.allowed_cuts(costs, min_cut)
    steps = np.asarray(devices.steps)[:, None]
    base = costs.adapter_bits * (1 / up + 1 / down) + steps * (
        costs.device_flops / devices.flops_per_s[:, None]
        + costs.uplink_bits / up
        + costs.downlink_bits / down
    )
    cycles = steps * (costs.server_flops / server.flops_per_cycle)

    def over_cuts(values: Array, among: NDArray[np.bool_], sign: int) -> Array:
        best: Array = sign * np.where(among, sign * values, np.inf).min(axis=1)
        return best

    serving = allowed & (cycles > 0)
    serving = np.where(serving.any(axis=1, keepdims=True), serving, allowed)
    delay_low = over_cuts(base + cycles / server.max_hz, allowed, 1)
    delay_span = over_cuts(base + cycles / server.min_hz, allowed, -1) - delay_low
    energy_low = server.energy_coefficient * server.min_hz**2 * over_cuts(cycles, serving, 1)
    energy_span = (
        server.energy_coefficient * server.max_hz**2 * over_cuts(cycles, allowed, -1) - energy_low
    )
    if jointly:
        delay_span = np.broadcast_to(delay_span.sum(), shape)
        energy_span = np.broadcast_to(energy_span.sum(), shape)
    # A span of 0 means that nothing can be gained: that term drops out.
    per_second = np.divide(delay_weight, delay_span, out=np.zeros(shape), where=delay_span > 0)
    per_joule = np.divide(1 - delay_weight, energy_span, out=np.zeros(shape), where=energy_span > 0)
    cost = 2 * server.energy_coefficient * per_joule
    clock = np.cbrt(np.divide(per_second, cost, out=np.full(shape, np.inf), where=cost > 0))
    clock = np.clip(clock, server.min_hz, server.max_hz)
    delay = base + cycles / clock[:, None]
    energy = server.energy_coefficient * clock[:, None] ** 2 * cycles
    utility = (
        per_second[:, None] * (delay - delay_low[:, None])
        + per_joule[:, None] * (energy - energy_low[:, None])
    )  # fmt: skip
    cut = np.where(allowed, utility, np.inf).argmin(axis=1)
    chosen = np.arange(len(devices)), cut
    return CardPlan(cut, clock, delay[chosen], energy[chosen], utility[chosen])
