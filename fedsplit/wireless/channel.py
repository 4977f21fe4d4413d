"""The channel: what every device's link looks like in a round, and the rate that follows."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsplit.errors import require
from fedsplit.seeds import generator
from fedsplit.wireless.fading import ScatteredField, ShadowField, complex_normal, rician
from fedsplit.wireless.mobility import RandomWaypoint
from fedsplit.wireless.pathloss import (
    SCENARIOS,
    SPEED_OF_LIGHT,
    line_of_sight_probability,
    path_loss_db,
    shadowing_sigma_db,
)
from fedsplit.wireless.rate import (
    db_to_linear,
    dbm_to_watt,
    snr_for_efficiency,
    spectral_efficiency,
)
from fedsplit.wireless.spec import ChannelSpec
from fedsplit.wireless.trace import MAX_RATE_BPS, read_trace

Array = NDArray[np.float64]

# A trace may not claim more than this on the configured band: 2^x would lose its meaning.
MAX_TRACE_EFFICIENCY = 100.0


@dataclass(frozen=True, eq=False)
class ChannelState:
    """One realisation of the channel.

    Parameters
    ----------
    gain_up, gain_down : ndarray
        Power gain of each link, linear, shape ``[N]``.
    power_up_w : ndarray
        Transmit power of each device, shape ``[N]``.
    power_down_w : float
        Power of the station over the whole downlink band.
    noise_w_hz : float
        Noise density.
    uplink_hz, downlink_hz : float
        The whole bands.
    rate, gap_db
        How a signal-to-noise ratio becomes a rate; see `spectral_efficiency`.
    """

    gain_up: Array
    gain_down: Array
    power_up_w: Array
    power_down_w: float
    noise_w_hz: float
    uplink_hz: float
    downlink_hz: float
    rate: str = "shannon"
    gap_db: float = 0.0

    @property
    def n_devices(self) -> int:
        """Number of devices."""
        return len(self.gain_up)


def uplink_bps(state: ChannelState, share_hz: ArrayLike, devices: ArrayLike | None = None) -> Array:
    """Return the uplink rate of devices that hold a share of the band (FDMA).

    ``R = B_n log2(1 + p_n g_n / (N0 B_n))``: a device puts all its power in its share (the rate of
    SFT, CARD and FedsLLM, papers' section 2 (b), 3 (b), 5 (b)). A share of 0 gives 0.

    Parameters
    ----------
    state : ChannelState
        The links.
    share_hz : array_like
        Share of each device, scalar or shape ``[M]``.
    devices : array_like of int, optional
        Which devices, shape ``[M]``; all by default.

    Returns
    -------
    ndarray
        Rates in bit/s, shape ``[M]``.
    """
    which = slice(None) if devices is None else np.asarray(devices)
    gain, power = state.gain_up[which], state.power_up_w[which]
    share = np.broadcast_to(np.asarray(share_hz, dtype=np.float64), gain.shape)
    used = share > 0
    noise = state.noise_w_hz * np.where(used, share, 1.0)
    efficiency = spectral_efficiency(power * gain / noise, state.rate, state.gap_db)
    return np.where(used, share * efficiency, 0.0)


def downlink_bps(
    state: ChannelState, share_hz: ArrayLike, devices: ArrayLike | None = None
) -> Array:
    """Return the downlink rate of devices that hold a share of the band (FDMA).

    ``R = B_n log2(1 + P g_n / (N0 B))``: the station spreads its power `P` evenly over the band
    `B`, so that simultaneous links together never exceed it. A device with the whole band gets
    CARD's rate. Parameters and result as in `uplink_bps`.
    """
    which = slice(None) if devices is None else np.asarray(devices)
    snr = state.power_down_w * state.gain_down[which] / (state.noise_w_hz * state.downlink_hz)
    share = np.broadcast_to(np.asarray(share_hz, dtype=np.float64), snr.shape)
    return share * spectral_efficiency(snr, state.rate, state.gap_db)


class Channel:
    """The radio links of a fleet, as a pure function of the seed and the time.

    Path loss and shadowing are common to both directions; small-scale fading is drawn for each,
    as for frequency-division duplex.

    Parameters
    ----------
    spec : ChannelSpec
        The radio model.
    positions_m : array_like
        Where the devices stand (at time 0, if they move), shape ``[N, 2]``.
    stations_m : array_like
        The station that serves each device, shape ``[N, 2]`` or ``[2]``.
    seed : int
        Root of all draws.

    Raises
    ------
    FedsplitError
        If a device is farther from its station than the path-loss model holds for, or the trace
        file is bad.
    """

    def __init__(
        self,
        spec: ChannelSpec,
        positions_m: ArrayLike,
        stations_m: ArrayLike = (0.0, 0.0),
        seed: int = 0,
    ) -> None:
        start = np.asarray(positions_m, dtype=np.float64)
        shaped = start.ndim == 2 and start.shape[1] == 2
        require(shaped, "positions_m", start.shape, "of shape [devices, 2]")
        require(bool(np.isfinite(start).all()), "positions_m", "not finite", "finite")
        self._spec, self._start_m, self._seed = spec, start, seed
        self._stations_m = np.broadcast_to(np.asarray(stations_m, dtype=np.float64), start.shape)
        n_devices = len(start)
        self._trace = read_trace(spec.trace_file) if spec.trace_file is not None else None
        if self._trace is not None:
            self._check_trace()
            return
        mobility = spec.mobility
        self._walk = (
            RandomWaypoint(
                start,
                mobility.side_m,
                (mobility.min_speed_m_s, mobility.max_speed_m_s),
                mobility.pause_s,
                seed,
            )
            if mobility.enabled
            else None
        )
        self._sight_draw = generator(seed, "line_of_sight").uniform(size=n_devices)
        self._shadow = ShadowField(n_devices, generator(seed, "shadowing"))
        self._doppler_hz = (spec.fading.speed_m_s or 0.0) * spec.carrier_hz / SPEED_OF_LIGHT
        directions = generator(seed, "direct_path").uniform(0, 2 * np.pi, (2, n_devices))
        self._direct_phase, self._direct_shift = directions[0], np.cos(directions[1])
        self._scattered = (
            {
                way: ScatteredField(n_devices, self._doppler_hz, generator(seed, "fading", way))
                for way in ("up", "down")
            }
            if spec.fading.speed_m_s is not None
            else None
        )
        # Without movement path loss and shadowing never change, and a bad position shows at once.
        self._mean = None if self._walk else self._mean_gain(start)

    def realise(self, round_: int, step: int | None = None) -> ChannelState:
        """Return the links in a round, or in one step of it.

        The same arguments always give the same state, whatever was asked for before. `step` only
        matters with ``fading.per: step``.

        Raises
        ------
        FedsplitError
            If `round_` or `step` is negative.
        """
        require(round_ >= 0, "round", round_, "at least 0")
        require(step is None or step >= 0, "step", step, "at least 0")
        spec = self._spec
        if self._trace is not None:
            row = round_ % self._trace.n_rounds
            return self._replayed(self._trace.uplink_bps[row], self._trace.downlink_bps[row])
        block = step if spec.fading.per == "step" and step is not None else 0
        time_s = round_ * spec.round_interval_s + block * spec.step_interval_s
        mean, in_sight = self._mean_at(time_s)
        return self._state(
            mean * self._fading_power("up", in_sight, round_, block, time_s),
            mean * self._fading_power("down", in_sight, round_, block, time_s),
        )

    def mean(self, round_: int) -> ChannelState:
        """Return the links in a round without small-scale fading, whose mean power is 1.

        Of a trace, the mean rates over all of its rounds.

        Raises
        ------
        FedsplitError
            If `round_` is negative.
        """
        require(round_ >= 0, "round", round_, "at least 0")
        if self._trace is not None:
            up, down = (
                rates.mean(axis=0) for rates in (self._trace.uplink_bps, self._trace.downlink_bps)
            )
            return self._replayed(up, down)
        mean, _ = self._mean_at(round_ * self._spec.round_interval_s)
        return self._state(mean, mean)

    def realise_steps(self, round_: int, steps: int) -> tuple[ChannelState, ...]:
        """Return the links in a round: one state, or one per step if fading is per step."""
        if self._spec.fading.per == "round" or self._trace is not None:
            return (self.realise(round_),)
        return tuple(self.realise(round_, step) for step in range(max(steps, 1)))

    def _mean_at(self, time_s: float) -> tuple[Array, NDArray[np.bool_]]:
        if self._mean is not None:
            return self._mean
        assert self._walk is not None
        return self._mean_gain(self._walk.positions_m(time_s))

    def _replayed(self, uplink_bps: Array, downlink_bps: Array) -> ChannelState:
        """Return the state whose links have the rates of a trace on the whole bands."""
        which = np.arange(len(self._start_m)) % len(uplink_bps)
        state = self._state(np.ones(len(which)), np.ones(len(which)))
        snr_up = snr_for_efficiency(uplink_bps[which] / state.uplink_hz)
        snr_down = snr_for_efficiency(downlink_bps[which] / state.downlink_hz)
        return self._state(
            snr_up * state.noise_w_hz * state.uplink_hz / state.power_up_w,
            snr_down * state.noise_w_hz * state.downlink_hz / state.power_down_w,
        )

    def _state(self, gain_up: Array, gain_down: Array) -> ChannelState:
        spec = self._spec
        return ChannelState(
            gain_up,
            gain_down,
            np.full(len(self._start_m), float(dbm_to_watt(spec.device_dbm))),
            float(dbm_to_watt(spec.station_dbm)),
            float(dbm_to_watt(spec.noise_dbm_hz)),
            spec.bandwidth_hz,
            spec.bandwidth_hz if spec.downlink_hz is None else spec.downlink_hz,
            spec.rate,
            spec.gap_db,
        )

    def _mean_gain(self, positions_m: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Return each link's gain without small-scale fading, and whether it is in sight."""
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

    def _fading_power(
        self, way: str, in_sight: NDArray[np.bool_], round_: int, block: int, time_s: float
    ) -> Array | float:
        fading = self._spec.fading
        if fading.kind == "none":
            return 1.0
        if self._scattered is not None:
            scattered = self._scattered[way].at(time_s)
        else:
            rng = generator(self._seed, "fading", way, round_, block)
            scattered = complex_normal(rng, len(in_sight))
        if fading.kind == "rician":
            turned = 2 * np.pi * self._doppler_hz * self._direct_shift * time_s
            k_factor = np.where(in_sight, db_to_linear(fading.k_db), 0.0)
            scattered = rician(scattered, self._direct_phase + turned, k_factor)
        return np.abs(scattered) ** 2

    def _check_trace(self) -> None:
        spec, trace = self._spec, self._trace
        assert trace is not None
        for name, rates, band in (
            ("uplink_bps", trace.uplink_bps, spec.bandwidth_hz),
            ("downlink_bps", trace.downlink_bps, spec.downlink_hz or spec.bandwidth_hz),
        ):
            allowed = min(MAX_RATE_BPS, MAX_TRACE_EFFICIENCY * band)
            highest = float(rates.max())
            require(
                math.isfinite(highest) and highest <= allowed,
                f"{spec.trace_file}: {name}",
                highest,
                f"at most {allowed:g}, {MAX_TRACE_EFFICIENCY:g} bit/s per hertz of the band",
            )
