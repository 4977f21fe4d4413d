"""The channel: what every device's link looks like in a round, and the rate that follows."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsplit.arrays import Array
from fedsplit.errors import FedsplitError, require
from fedsplit.wireless.links import Links, Sight
from fedsplit.wireless.mobility import RandomWaypoint
from fedsplit.wireless.rate import dbm_to_watt, snr_for_efficiency, spectral_efficiency
from fedsplit.wireless.spec import ChannelSpec
from fedsplit.wireless.trace import GAIN, MAX_RATE_BPS, RATE, read_trace

# A trace may not claim more than this on the configured band: 2^x would lose its meaning.
MAX_TRACE_EFFICIENCY = 100.0


@dataclass(frozen=True, eq=False, kw_only=True)
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
    home : ndarray of int, optional
        The station at the other end of each link, shape ``[N]``; None where nothing tells.
    gains_to : callable, optional
        ``gains_to(station)``: what `gain_up` and `gain_down` would be if every device's link ended
        at `station`; None where only the given links are known.
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
    home: NDArray[np.int64] | None = None
    gains_to: Callable[[int], tuple[Array, Array]] | None = None

    @property
    def n_devices(self) -> int:
        """Number of devices."""
        return len(self.gain_up)

    def over(self, stations: ArrayLike) -> "ChannelState":
        """Return the state in which each device's link ends at the station given for it.

        Parameters
        ----------
        stations : array_like of int
            Station of each device, shape ``[N]``. A device that is out of its reach has gain 0.

        Raises
        ------
        FedsplitError
            If a link to another station than the given one is not known, as with a trace.
        """
        wanted = np.asarray(stations, dtype=np.int64)
        if self.home is None or np.array_equal(wanted, self.home):
            return self
        if self.gains_to is None:
            device = int(np.flatnonzero(wanted != self.home)[0])
            raise FedsplitError(
                f"edge={wanted[device]} of device {device}: must be {self.home[device]}, the only "
                "station that its link is known to"
            )
        up, down = self.gain_up.copy(), self.gain_down.copy()
        for station in np.unique(wanted[wanted != self.home]):
            moved = (wanted == station) & (self.home != station)
            gains = self.gains_to(int(station))
            up[moved], down[moved] = gains[0][moved], gains[1][moved]
        return replace(self, gain_up=up, gain_down=down, home=wanted)


def uplink_bps(
    state: ChannelState,
    share_hz: ArrayLike,
    devices: ArrayLike | None = None,
    power_w: ArrayLike | None = None,
) -> Array:
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
    power_w : array_like, optional
        What they send with, scalar or shape ``[M]``; all their power by default.

    Returns
    -------
    ndarray
        Rates in bit/s, shape ``[M]``.
    """
    which = slice(None) if devices is None else np.asarray(devices)
    gain = state.gain_up[which]
    power = state.power_up_w[which] if power_w is None else np.asarray(power_w)
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

    Every device has a station of its own; its links to the others are independent of that one and
    of each other.

    Parameters
    ----------
    spec : ChannelSpec
        The radio model.
    positions_m : array_like
        Where the devices stand (at time 0, if they move), shape ``[N, 2]``.
    stations_m : array_like
        Where the stations stand, shape ``[K, 2]``, or ``[2]`` for a single one.
    seed : int
        Root of all draws.
    home : array_like of int, optional
        The station that serves each device, shape ``[N]``; with a single station, that one.

    Raises
    ------
    FedsplitError
        If a device is farther from its station than the path-loss model holds for, if it has no
        station, or the trace file is bad.
    """

    def __init__(
        self,
        spec: ChannelSpec,
        positions_m: ArrayLike,
        stations_m: ArrayLike = (0.0, 0.0),
        seed: int = 0,
        home: ArrayLike | None = None,
    ) -> None:
        start = np.asarray(positions_m, dtype=np.float64)
        shaped = start.ndim == 2 and start.shape[1] == 2
        require(shaped, "positions_m", start.shape, "of shape [devices, 2]")
        require(bool(np.isfinite(start).all()), "positions_m", "not finite", "finite")
        self._spec, self._start_m, self._seed = spec, start, seed
        self._stations_m = np.atleast_2d(np.asarray(stations_m, dtype=np.float64))
        self._home = _homes(home, len(start), len(self._stations_m))
        self._trace = None
        if spec.trace_file is not None:
            self._trace = read_trace(spec.trace_file, spec.trace_uplink_file)
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
        self._links = Links(spec, self._stations_m[self._home], seed)
        self._links_to: dict[int, Links] = {}
        # Without movement path loss and shadowing never change, and a bad position shows at once.
        self._mean = None if self._walk else self._links.mean_gain(start)

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
            time_s = round_ * spec.round_interval_s + (step or 0) * spec.step_interval_s
            return self._replayed(
                self._trace.up.at(round_, time_s), self._trace.down.at(round_, time_s)
            )
        block = step if spec.fading.per == "step" and step is not None else 0
        time_s = round_ * spec.round_interval_s + block * spec.step_interval_s
        mean, in_sight = self._mean_at(time_s)

        def faded(links: Links, mean: Array, in_sight: Sight) -> tuple[Array, Array]:
            return (
                mean * links.fading_power("up", in_sight, round_, block, time_s),
                mean * links.fading_power("down", in_sight, round_, block, time_s),
            )

        return self._state(
            *faded(self._links, mean, in_sight),
            lambda station: faded(*self._reached(station, time_s)),
        )

    def mean(self, round_: int) -> ChannelState:
        """Return the links in a round without small-scale fading, whose mean power is 1.

        Of a trace, the means over all that was recorded.

        Raises
        ------
        FedsplitError
            If `round_` is negative.
        """
        require(round_ >= 0, "round", round_, "at least 0")
        if self._trace is not None:
            ways = (self._trace.up, self._trace.down)
            return self._replayed(*(way.values.mean(axis=0) for way in ways))
        time_s = round_ * self._spec.round_interval_s
        mean, _ = self._mean_at(time_s)

        def elsewhere(station: int) -> tuple[Array, Array]:
            _, gain, _ = self._reached(station, time_s)
            return gain, gain

        return self._state(mean, mean, elsewhere)

    def realise_steps(self, round_: int, steps: int) -> tuple[ChannelState, ...]:
        """Return the links in a round: one state, or one per step where they change in it."""
        trace = self._trace
        if self._spec.fading.per == "round" if trace is None else not trace.is_timed:
            return (self.realise(round_),)
        return tuple(self.realise(round_, step) for step in range(max(steps, 1)))

    def _mean_at(self, time_s: float) -> tuple[Array, Sight]:
        if self._mean is not None:
            return self._mean
        return self._links.mean_gain(self._positions_m(time_s))

    def _positions_m(self, time_s: float) -> Array:
        return self._start_m if self._walk is None else self._walk.positions_m(time_s)

    def _reached(self, station: int, time_s: float) -> tuple[Links, Array, Sight]:
        """Return the links of all devices to `station`, with gain 0 where it is out of reach."""
        count = len(self._stations_m)
        require(0 <= station < count, "station", station, f"from 0 to {count - 1}")
        place = self._stations_m[station]
        if station not in self._links_to:
            there = np.tile(place, (len(self._start_m), 1))
            self._links_to[station] = Links(self._spec, there, self._seed, "station", station)
        links, positions = self._links_to[station], self._positions_m(time_s)
        near = links.in_reach(positions)[:, None]
        # Who is out of reach is put beside the station, where the model holds, and then silenced.
        gain, in_sight = links.mean_gain(np.where(near, positions, place))
        return links, np.where(near[:, 0], gain, 0.0), in_sight

    def _replayed(self, up: Array, down: Array) -> ChannelState:
        """Return the state whose links are those of a row of the trace."""
        assert self._trace is not None
        which = np.arange(len(self._start_m)) % len(up)
        up, down = up[which], down[which]
        if self._trace.kind == GAIN:
            return self._state(up, down)
        state = self._state(np.ones(len(up)), np.ones(len(down)))
        if self._trace.kind == RATE:
            up = snr_for_efficiency(up / state.uplink_hz)
            down = snr_for_efficiency(down / state.downlink_hz)
        return self._state(
            up * state.noise_w_hz * state.uplink_hz / state.power_up_w,
            down * state.noise_w_hz * state.downlink_hz / state.power_down_w,
        )

    def _state(
        self,
        gain_up: Array,
        gain_down: Array,
        elsewhere: Callable[[int], tuple[Array, Array]] | None = None,
    ) -> ChannelState:
        def gains_to(station: int) -> tuple[Array, Array]:
            assert elsewhere is not None
            up, down = elsewhere(station)
            own = self._home == station
            return np.where(own, gain_up, up), np.where(own, gain_down, down)

        spec = self._spec
        return ChannelState(
            gain_up=gain_up,
            gain_down=gain_down,
            power_up_w=np.full(len(self._start_m), float(dbm_to_watt(spec.device_dbm))),
            power_down_w=float(dbm_to_watt(spec.station_dbm)),
            noise_w_hz=float(dbm_to_watt(spec.noise_dbm_hz)),
            uplink_hz=spec.bandwidth_hz,
            downlink_hz=spec.bandwidth_hz if spec.downlink_hz is None else spec.downlink_hz,
            rate=spec.rate,
            gap_db=spec.gap_db,
            home=self._home,
            gains_to=None if elsewhere is None else gains_to,
        )

    def _check_trace(self) -> None:
        spec, trace = self._spec, self._trace
        assert trace is not None
        for name, way, band in (
            ("uplink_bps", trace.up, spec.bandwidth_hz),
            ("downlink_bps", trace.down, spec.downlink_hz or spec.bandwidth_hz),
        ):
            if trace.kind != RATE:
                continue
            allowed = min(MAX_RATE_BPS, MAX_TRACE_EFFICIENCY * band)
            highest = float(way.values.max())
            require(
                math.isfinite(highest) and highest <= allowed,
                f"{spec.trace_file}: {name}",
                highest,
                f"at most {allowed:g}, {MAX_TRACE_EFFICIENCY:g} bit/s per hertz of the band",
            )


def _homes(home: ArrayLike | None, n_devices: int, n_stations: int) -> NDArray[np.int64]:
    """Return the station of each device, checked."""
    if home is None:
        require(n_stations == 1, "home", None, f"given, for there are {n_stations} stations")
        return np.zeros(n_devices, dtype=np.int64)
    homes = np.asarray(home, dtype=np.int64)
    require(homes.shape == (n_devices,), "home", homes.shape, f"of shape ({n_devices},)")
    known = bool(((homes >= 0) & (homes < n_stations)).all())
    require(known, "home", homes.tolist(), f"stations 0 to {n_stations - 1}")
    return homes
