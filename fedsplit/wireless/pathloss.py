"""Path loss, line-of-sight probability and shadowing spread, as formulas over arrays.

The models are those of 3GPP TR 38.901 V16.1.0: Table 7.4.1-1 (path loss and shadowing),
Table 7.4.2-1 (line-of-sight probability), Table 7.5-6 (shadowing correlation distance); the rule
``128.1 + 37.6 log10(d_km)`` of 3GPP TR 36.942, 4.5.2 (2 GHz), which many papers use; and free
space. They are the mean loss in dB, positive; shadowing and fading are drawn elsewhere.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fedsplit.arrays import Array
from fedsplit.errors import require, require_choice

# TR 38.901 Table 7.4.1-1, note 1: c = 3.0e8 m/s.
SPEED_OF_LIGHT = 3.0e8


@dataclass(frozen=True)
class Scenario:
    """What a path-loss model assumes besides distance.

    Parameters
    ----------
    min_m, max_m : float
        Horizontal distances the model holds for. Closer devices are charged the loss at `min_m`.
    station_m, device_m : float
        Usual antenna heights.
    device_range_m : tuple of float
        Allowed height of the device.
    carrier_range_hz : tuple of float
        Allowed carrier.
    sigma_db : tuple of float
        Shadowing standard deviation with and without line of sight.
    correlation_m : tuple of float
        Distance over which shadowing decorrelates to 1/e, with and without line of sight.
    """

    min_m: float
    max_m: float
    station_m: float
    device_m: float
    device_range_m: tuple[float, float]
    carrier_range_hz: tuple[float, float]
    sigma_db: tuple[float, float]
    correlation_m: tuple[float, float]


_WIDE = (0.5e9, 100e9)
# UMa: above 13 m the effective environment height is itself random (Table 7.4.1-1 note 1); up to
# 13 m it is 1 m for sure, which keeps the mean loss a formula.
SCENARIOS = {
    "uma": Scenario(10, 5e3, 25, 1.5, (1.5, 13), _WIDE, (4, 6), (37, 50)),
    "umi": Scenario(10, 5e3, 10, 1.5, (1.5, 22.5), _WIDE, (4, 7.82), (10, 13)),
    "rma": Scenario(10, 5e3, 35, 1.5, (1, 10), (0.5e9, 30e9), (4, 8), (37, 120)),
    "inh_mixed": Scenario(1, 150, 3, 1, (0.5, 3), _WIDE, (3, 8.03), (10, 6)),
    "inh_open": Scenario(1, 150, 3, 1, (0.5, 3), _WIDE, (3, 8.03), (10, 6)),
    # The papers give one shadowing figure (8 dB, papers' FedsLLM settings) and no correlation
    # distance; 50 m is UMa's without line of sight.
    "papers": Scenario(1, 35e3, 25, 1.5, (0, 50), (0.1e9, 100e9), (8, 8), (50, 50)),
    "free_space": Scenario(1, 1e6, 10, 1.5, (0, 1e4), (1e6, 300e9), (0, 0), (50, 50)),
}
RMA_STREET_WIDTH_M = 20.0
RMA_BUILDING_HEIGHT_M = 5.0


def line_of_sight_probability(model: str, distance_m: ArrayLike) -> Array:
    """Return the probability of line of sight at a horizontal distance.

    TR 38.901 Table 7.4.2-1. The models "papers" and "free_space" do not tell the two apart: 1.

    Parameters
    ----------
    model : str
        A key of `SCENARIOS`.
    distance_m : array_like
        Horizontal distance in metres, any shape.

    Returns
    -------
    ndarray
        Probabilities, shape of `distance_m`.

    Raises
    ------
    FedsplitError
        If `model` is unknown.
    """
    require_choice("path_loss", model, SCENARIOS)
    d = np.maximum(np.asarray(distance_m, dtype=np.float64), 1e-9)
    match model:
        case "uma":
            return _street_sight(d, 63)
        case "umi":
            return _street_sight(d, 36)
        case "rma":
            probability: Array = np.exp(-np.maximum(d - 10, 0) / 1000)
            return probability
        case "inh_mixed":
            near = np.exp(-np.maximum(d - 1.2, 0) / 4.7)
            return np.where(d < 6.5, near, 0.32 * np.exp(-(d - 6.5) / 32.6))
        case "inh_open":
            near = np.exp(-np.maximum(d - 5, 0) / 70.8)
            return np.where(d <= 49, near, 0.54 * np.exp(-(d - 49) / 211.7))
        case _:
            return np.ones_like(d)


def _street_sight(d: Array, decay_m: float) -> Array:
    # Below 18 m the expression exceeds 1, which the table caps.
    probability: Array = np.minimum(1.0, 18 / d + np.exp(-d / decay_m) * (1 - 18 / d))
    return probability


def path_loss_db(
    model: str,
    distance_m: ArrayLike,
    line_of_sight: ArrayLike,
    carrier_hz: float,
    station_m: float | None = None,
    device_m: float | None = None,
) -> Array:
    """Return the mean path loss in dB.

    Parameters
    ----------
    model : str
        A key of `SCENARIOS`.
    distance_m : array_like
        Horizontal distance, raised to the model's shortest.
    line_of_sight : array_like of bool
        Whether the path is in line of sight; broadcast against `distance_m`.
    carrier_hz : float
        Carrier frequency ("papers" ignores it: its 2 GHz are in the constant).
    station_m, device_m : float or None
        Antenna heights; None means the scenario's usual one.

    Returns
    -------
    ndarray
        Loss in dB, broadcast shape.

    Raises
    ------
    FedsplitError
        If `model` is unknown, or a distance, height or carrier is outside what it holds for.
    """
    require_choice("path_loss", model, SCENARIOS)
    scenario = SCENARIOS[model]
    h_station = scenario.station_m if station_m is None else station_m
    h_device = scenario.device_m if device_m is None else device_m
    low, high = scenario.device_range_m
    require(low <= h_device <= high, "device_m", h_device, f"in {low}..{high} for {model}")
    require(h_station > 1.0, "station_m", h_station, "above 1")
    low, high = scenario.carrier_range_hz
    require(low <= carrier_hz <= high, "carrier_hz", carrier_hz, f"in {low:g}..{high:g} ({model})")
    given = np.asarray(distance_m, dtype=np.float64)
    inside = bool(np.all(given <= scenario.max_m))
    farthest = float(given.max()) if given.size else 0.0
    require(inside, "distance_m", farthest, f"at most {scenario.max_m:g} for {model}")
    d2 = np.maximum(given, scenario.min_m)
    d3 = np.hypot(d2, h_station - h_device)
    los = np.asarray(line_of_sight, dtype=bool)
    loss: Array
    match model:
        case "uma":
            loss = _uma(d2, d3, los, carrier_hz, h_station, h_device)
        case "umi":
            loss = _umi(d2, d3, los, carrier_hz, h_station, h_device)
        case "rma":
            loss = _rma(d2, d3, los, carrier_hz, h_station, h_device)
        case "inh_mixed" | "inh_open":
            loss = _inh(d3, los, carrier_hz)
        case "papers":
            loss = 128.1 + 37.6 * np.log10(d2 / 1e3)
        case _:
            loss = 20 * np.log10(4 * np.pi * d3 * carrier_hz / SPEED_OF_LIGHT)
    return loss


def _two_slopes(
    d2: Array,
    d3: Array,
    fc_hz: float,
    h_station: float,
    h_device: float,
    *,
    constant: float,
    slope: float,
    corner: float,
) -> Array:
    """Return the urban loss in sight: `slope` up to the break point, 40 dB per decade beyond.

    The break point is that of Table 7.4.1-1 note 1 with the effective environment height 1 m of
    UMi and low UMa.
    """
    fc = fc_hz / 1e9
    d_bp = 4 * (h_station - 1.0) * (h_device - 1.0) * fc_hz / SPEED_OF_LIGHT
    near = constant + slope * np.log10(d3) + 20 * np.log10(fc)
    drop = corner * np.log10(d_bp**2 + (h_station - h_device) ** 2)
    far = constant + 40 * np.log10(d3) + 20 * np.log10(fc) - drop
    seen: Array = np.where(d2 <= d_bp, near, far)
    return seen


def _uma(
    d2: Array, d3: Array, los: Array, fc_hz: float, h_station: float, h_device: float
) -> Array:
    seen = _two_slopes(d2, d3, fc_hz, h_station, h_device, constant=28.0, slope=22, corner=9)
    hidden = 13.54 + 39.08 * np.log10(d3) + 20 * np.log10(fc_hz / 1e9) - 0.6 * (h_device - 1.5)
    return _worse_hidden(los, seen, hidden)


def _umi(
    d2: Array, d3: Array, los: Array, fc_hz: float, h_station: float, h_device: float
) -> Array:
    seen = _two_slopes(d2, d3, fc_hz, h_station, h_device, constant=32.4, slope=21, corner=9.5)
    hidden = 35.3 * np.log10(d3) + 22.4 + 21.3 * np.log10(fc_hz / 1e9) - 0.3 * (h_device - 1.5)
    return _worse_hidden(los, seen, hidden)


def _worse_hidden(los: Array, seen: Array, hidden: Array) -> Array:
    """Return the loss by sight; without it, never less than with it."""
    loss: Array = np.where(los, seen, np.maximum(seen, hidden))
    return loss


def _rma(
    d2: Array, d3: Array, los: Array, fc_hz: float, h_station: float, h_device: float
) -> Array:
    fc, h, w = fc_hz / 1e9, RMA_BUILDING_HEIGHT_M, RMA_STREET_WIDTH_M
    d_bp = 2 * np.pi * h_station * h_device * fc_hz / SPEED_OF_LIGHT

    def near(distance: Array | float) -> Array:
        loss: Array = (
            20 * np.log10(40 * np.pi * distance * fc / 3)
            + min(0.03 * h**1.72, 10) * np.log10(distance)
            - min(0.044 * h**1.72, 14.77)
            + 0.002 * np.log10(h) * distance
        )
        return loss

    seen = np.where(d2 <= d_bp, near(d3), near(d_bp) + 40 * np.log10(d3 / d_bp))
    hidden = (
        161.04
        - 7.1 * np.log10(w)
        + 7.5 * np.log10(h)
        - (24.37 - 3.7 * (h / h_station) ** 2) * np.log10(h_station)
        + (43.42 - 3.1 * np.log10(h_station)) * (np.log10(d3) - 3)
        + 20 * np.log10(fc)
        - (3.2 * np.log10(11.75 * h_device) ** 2 - 4.97)
    )
    return _worse_hidden(los, seen, hidden)


def _inh(d3: Array, los: Array, fc_hz: float) -> Array:
    fc = fc_hz / 1e9
    seen = 32.4 + 17.3 * np.log10(d3) + 20 * np.log10(fc)
    hidden = 38.3 * np.log10(d3) + 17.30 + 24.9 * np.log10(fc)
    return _worse_hidden(los, seen, hidden)


def shadowing_sigma_db(
    model: str,
    distance_m: ArrayLike,
    los: ArrayLike,
    carrier_hz: float,
    station_m: float | None = None,
    device_m: float | None = None,
) -> Array:
    """Return the standard deviation of shadowing in dB (TR 38.901 Table 7.4.1-1).

    RMa in line of sight has 4 dB up to the break point and 6 dB beyond.
    """
    scenario = SCENARIOS[model]
    seen, hidden = scenario.sigma_db
    sigma = np.where(los, seen, hidden) + np.zeros_like(np.asarray(distance_m, dtype=np.float64))
    if model == "rma":
        h_station = scenario.station_m if station_m is None else station_m
        h_device = scenario.device_m if device_m is None else device_m
        d_bp = 2 * np.pi * h_station * h_device * carrier_hz / SPEED_OF_LIGHT
        sigma = np.where(np.asarray(los) & (np.asarray(distance_m) > d_bp), 6.0, sigma)
    return sigma
