"""The radio links of a fleet to one station for each device, without power and band."""

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.seeds import generator
from fedsplit.wireless.fading import ScatteredField, ShadowField, complex_normal, rician
from fedsplit.wireless.pathloss import (
    SCENARIOS,
    SPEED_OF_LIGHT,
    line_of_sight_probability,
    path_loss_db,
    shadowing_sigma_db,
)
from fedsplit.wireless.rate import db_to_linear
from fedsplit.wireless.spec import ChannelSpec

Sight = NDArray[np.bool_]


class Links:
    """The links of N devices to a station each: path loss, shadowing, small-scale fading.

    Path loss and shadowing are common to both directions; small-scale fading is drawn for each, as
    for frequency-division duplex.

    Parameters
    ----------
    spec : ChannelSpec
        The radio model.
    stations_m : ndarray
        The station at the other end of each device's link, shape ``[N, 2]``.
    seed : int
        Root of all draws.
    names : tuple
        What tells these links' draws from those of others, beside the seed.
    """

    def __init__(self, spec: ChannelSpec, stations_m: Array, seed: int, *names: str | int) -> None:
        n_devices = len(stations_m)
        self._spec, self._stations_m, self._seed, self._names = spec, stations_m, seed, names
        self._sight_draw = generator(seed, "line_of_sight", *names).uniform(size=n_devices)
        self._shadow = ShadowField(n_devices, generator(seed, "shadowing", *names))
        self._doppler_hz = (spec.fading.speed_m_s or 0.0) * spec.carrier_hz / SPEED_OF_LIGHT
        rng = generator(seed, "direct_path", *names)
        directions = rng.uniform(0, 2 * np.pi, (2, n_devices))
        self._direct_phase, self._direct_shift = directions[0], np.cos(directions[1])
        self._scattered = (
            {way: ScatteredField(n_devices, self._doppler_hz, self._rng(way)) for way in _WAYS}
            if spec.fading.speed_m_s is not None
            else None
        )

    def mean_gain(self, positions_m: Array) -> tuple[Array, Sight]:
        """Return each link's gain without small-scale fading, and whether it is in sight.

        Raises
        ------
        FedsplitError
            If a device is farther from its station than the path-loss model holds for.
        """
        spec = self._spec
        distance = np.linalg.norm(positions_m - self._stations_m, axis=1)
        if spec.line_of_sight == "random":
            in_sight = self._sight_draw < line_of_sight_probability(spec.path_loss, distance)
        else:
            in_sight = np.full(len(distance), spec.line_of_sight == "always")
        links = (spec.path_loss, distance, in_sight, spec.carrier_hz, spec.station_m, spec.device_m)
        loss_db = path_loss_db(*links)
        sigma = shadowing_sigma_db(*links) if spec.shadowing_db is None else spec.shadowing_db
        correlation = np.where(in_sight, *SCENARIOS[spec.path_loss].correlation_m)
        shadow_db = sigma * self._shadow.at(positions_m, correlation)
        return db_to_linear(-(loss_db + shadow_db)), in_sight

    def in_reach(self, positions_m: Array) -> Sight:
        """Return which devices are near enough for the path-loss model to hold."""
        distance = np.linalg.norm(positions_m - self._stations_m, axis=1)
        near: Sight = distance <= SCENARIOS[self._spec.path_loss].max_m
        return near

    def fading_power(
        self, way: str, in_sight: Sight, round_: int, block: int, time_s: float
    ) -> Array | float:
        """Return the power of small-scale fading, of mean 1: in a round's block, or at a time."""
        fading = self._spec.fading
        if fading.kind == "none":
            return 1.0
        if self._scattered is not None:
            scattered = self._scattered[way].at(time_s)
        else:
            scattered = complex_normal(self._rng(way, round_, block), len(in_sight))
        if fading.kind == "rician":
            turned = 2 * np.pi * self._doppler_hz * self._direct_shift * time_s
            k_factor = np.where(in_sight, db_to_linear(fading.k_db), 0.0)
            scattered = rician(scattered, self._direct_phase + turned, k_factor)
        return np.abs(scattered) ** 2

    def _rng(self, way: str, *moment: int) -> np.random.Generator:
        return generator(self._seed, "fading", *self._names, way, *moment)


_WAYS = ("up", "down")
