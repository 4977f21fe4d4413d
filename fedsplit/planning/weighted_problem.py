"""What a round of devices in parallel counts by energy and delay, and how it may be planned."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsplit.arrays import Array
from fedsplit.errors import require
from fedsplit.planning.card import ServerClock
from fedsplit.planning.costs import CutCosts, Devices
from fedsplit.planning.errors import checked, checked_links

Ints = NDArray[np.int64]
LEAST_POWER = 0.01
"""The least transmit power over the highest: 20 dB of power control."""


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightedProblem:
    """A round of N devices in parallel, and what its joules and seconds count.

    Parameters
    ----------
    costs : CutCosts
        The model, as compressed by the codecs.
    devices : Devices
        Memory and mini-batches of each device, and its speed at the highest clock.
    clock_hz, min_hz, energy_coefficient : array_like
        Highest and lowest clock and ``xi`` of each device, scalar or ``[N]``.
    power_w, uplink_snr_hz : array_like
        Highest transmit power, W, and ``gain power / noise density`` at it, Hz.
    power_range : float
        The least power over the highest; 1 where power cannot be chosen.
    downlink_efficiency : array_like
        bit/s per hertz.
    uplink_hz, downlink_hz : float
        The whole bands. A device has the same fraction of both.
    power_down_w : float
        Power of the station over the whole downlink band.
    server : ServerClock
        The server.
    server_share : float or None
        None: branches queue for the server, whose clock is chosen. Else each has this part of its
        speed to itself, at the highest clock.
    device_weight : array_like
        What a joule of each device counts, at least 0, scalar or ``[N]``.
    joule_weight, second_weight : float
        What a joule of the server and station, and a second of the round count.
    min_cut : int
        Blocks that stay on a device at least.

    Raises
    ------
    InfeasibleError
        If a device has no rate.
    FedsplitError
        If a value is NaN or negative.
    """

    costs: CutCosts
    devices: Devices
    clock_hz: ArrayLike
    min_hz: ArrayLike
    energy_coefficient: ArrayLike
    power_w: ArrayLike
    uplink_snr_hz: ArrayLike
    power_range: float = LEAST_POWER
    downlink_efficiency: ArrayLike
    uplink_hz: float
    downlink_hz: float
    power_down_w: float
    server: ServerClock
    server_share: float | None = None
    device_weight: ArrayLike = 1.0
    joule_weight: float = 1.0
    second_weight: float = 1.0
    min_cut: int = 1

    def __post_init__(self) -> None:
        shape = (len(self.devices),)
        for name in ("clock_hz", "min_hz", "power_w"):
            value = checked(name, getattr(self, name), shape, positive=True)
            object.__setattr__(self, name, value)
        for name in ("energy_coefficient", "device_weight"):
            object.__setattr__(self, name, checked(name, getattr(self, name), shape))
        for name in ("uplink_snr_hz", "downlink_efficiency"):
            value = checked_links(name, getattr(self, name), shape, self.costs.uplink_bits.min())
            object.__setattr__(self, name, value)
        for name in ("uplink_hz", "downlink_hz"):
            checked(name, getattr(self, name), positive=True)
        for name in ("power_down_w", "joule_weight", "second_weight"):
            checked(name, getattr(self, name))
        require(0 < self.power_range <= 1, "power_range", self.power_range, "above 0, at most 1")


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightedPlan:
    """A round of devices that train in parallel; arrays have shape ``[N]``.

    Parameters
    ----------
    cut : ndarray of int
        Blocks on each device.
    share : ndarray
        Its fraction of both bands.
    device_hz, uplink_w : ndarray
        Its clock and transmit power.
    server_hz : float
        Clock of the server.
    device_j : ndarray
        Energy of each device.
    energy_j : float
        Of devices, server and station.
    delay_s : float
        No round takes longer, in whatever order the server works.
    objective, bound : float
        What all this counts, and what no plan can pass.
    """

    cut: Ints
    share: Array
    device_hz: Array
    uplink_w: Array
    server_hz: float
    device_j: Array
    energy_j: float
    delay_s: float
    objective: float
    bound: float

    @property
    def gap(self) -> float:
        """Relative distance from the bound, at least 0."""
        return max(0.0, 1.0 - self.bound / self.objective) if self.objective > 0 else 0.0
