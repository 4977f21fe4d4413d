"""Settings of the radio model."""

import math
from dataclasses import dataclass, field, fields

from fedsplit.errors import require, require_choice
from fedsplit.wireless.pathloss import SCENARIOS
from fedsplit.wireless.rate import RATE_MODELS

TRACE = "trace"


def _require_positive(name: str, value: float) -> None:
    require(math.isfinite(value) and value > 0, name, value, "finite and above 0")


def _require_finite(name: str, value: float) -> None:
    require(math.isfinite(value), name, value, "finite")


@dataclass(frozen=True)
class FadingSpec:
    """Small-scale fading of the link power; its mean is 1.

    Parameters
    ----------
    kind : str
        "none", "rayleigh", or "rician" (a direct path on links in line of sight).
    k_db : float
        Rician factor in dB; 9 is the mean of UMi and UMa (TR 38.901 Table 7.5-6).
    per : str
        "round": one value per round; "step": one per mini-batch.
    speed_m_s : float or None
        Speed that sets the Doppler shift and so the correlation in time (Jakes). None draws every
        block independently.
    """

    kind: str = "rayleigh"
    k_db: float = 9.0
    per: str = "round"
    speed_m_s: float | None = None

    def __post_init__(self) -> None:
        require_choice("channel.fading.kind", self.kind, ("none", "rayleigh", "rician"))
        require_choice("channel.fading.per", self.per, ("round", "step"))
        _require_finite("channel.fading.k_db", self.k_db)
        speed = self.speed_m_s
        allowed = "null or from 0 to 1000"
        require(speed is None or 0 <= speed <= 1000, "channel.fading.speed_m_s", speed, allowed)


@dataclass(frozen=True)
class MobilitySpec:
    """Random-waypoint movement; `enabled: false` leaves devices where the fleet put them.

    Parameters
    ----------
    enabled : bool
        Whether devices move.
    side_m : float
        Side of the square, centred at the origin, that they move in.
    min_speed_m_s, max_speed_m_s : float
        Range of the speed of a leg.
    pause_s : float
        Rest at each waypoint.
    """

    enabled: bool = False
    side_m: float = 500.0
    min_speed_m_s: float = 0.5
    max_speed_m_s: float = 1.5
    pause_s: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("channel.mobility.side_m", self.side_m)
        low, high = self.min_speed_m_s, self.max_speed_m_s
        _require_positive("channel.mobility.min_speed_m_s", low)
        require(
            low <= high <= 1000,
            "channel.mobility.max_speed_m_s",
            high,
            f"from min_speed_m_s={low} to 1000",
        )
        pause = self.pause_s
        require(0 <= pause < math.inf, "channel.mobility.pause_s", pause, "finite and at least 0")


@dataclass(frozen=True, kw_only=True)
class ChannelSpec:
    """The radio access network of a fleet.

    Parameters
    ----------
    path_loss : str
        A model of `fedsplit.wireless.SCENARIOS` or "trace".
    carrier_hz : float
        Carrier frequency, also for the Doppler shift.
    bandwidth_hz : float
        Whole uplink band, shared by the devices that send at once.
    downlink_hz : float or None
        Whole downlink band; None means as wide as the uplink.
    device_dbm, station_dbm : float
        Transmit power of a device, and of the station over the whole downlink band.
    noise_dbm_hz : float
        Noise density; add the receiver's noise figure here.
    station_m, device_m : float or None
        Antenna heights; None means the scenario's usual ones.
    line_of_sight : str
        "random" (by the scenario's probability), "always" or "never".
    shadowing_db : float or None
        Standard deviation of shadowing; None means the scenario's, 0 none.
    fading, mobility
        Small-scale fading and movement.
    round_interval_s, step_interval_s : float
        Time from one round, or step, to the next: how far fading and movement get.
    rate : str
        "shannon", "cqi_64qam" or "cqi_256qam"; see `spectral_efficiency`.
    gap_db : float
        Distance of the receiver from capacity.
    trace_file : str or None
        Recorded links for ``path_loss: trace``; see `fedsplit.wireless.trace`.
    trace_uplink_file : str or None
        The way up, where another file has it.
    """

    path_loss: str = "papers"
    carrier_hz: float = 2e9
    bandwidth_hz: float = 20e6
    downlink_hz: float | None = None
    device_dbm: float = 23.0
    station_dbm: float = 43.0
    noise_dbm_hz: float = -174.0
    station_m: float | None = None
    device_m: float | None = None
    line_of_sight: str = "random"
    shadowing_db: float | None = None
    fading: FadingSpec = field(default_factory=FadingSpec)
    mobility: MobilitySpec = field(default_factory=MobilitySpec)
    round_interval_s: float = 10.0
    step_interval_s: float = 0.1
    rate: str = "shannon"
    gap_db: float = 0.0
    trace_file: str | None = None
    trace_uplink_file: str | None = None

    def __post_init__(self) -> None:
        require_choice("channel.path_loss", self.path_loss, (*SCENARIOS, TRACE))
        require_choice("channel.line_of_sight", self.line_of_sight, ("random", "always", "never"))
        require_choice("channel.rate", self.rate, RATE_MODELS)
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float):
                positive = item.name.endswith(("_hz", "_s", "_m")) and item.name != "noise_dbm_hz"
                check = _require_positive if positive else _require_finite
                check(f"channel.{item.name}", value)
        sigma = self.shadowing_db
        allowed = "null or from 0 to 50"
        require(sigma is None or 0 <= sigma <= 50, "channel.shadowing_db", sigma, allowed)
        if self.path_loss == TRACE:
            require(self.trace_file is not None, "channel.trace_file", None, "a CSV file")
            # The gain that stands for a measured rate is found by inverting Shannon's formula.
            exact = self.rate == "shannon" and self.gap_db == 0
            require(exact, "channel.rate", self.rate, "shannon with gap_db=0 for a trace")
            require(
                not self.mobility.enabled, "channel.mobility.enabled", True, "false for a trace"
            )
        else:
            scenario, model = SCENARIOS[self.path_loss], self.path_loss
            for name, value, (least, most) in (
                ("carrier_hz", self.carrier_hz, scenario.carrier_range_hz),
                ("device_m", self.device_m, scenario.device_range_m),
            ):
                inside = value is None or least <= value <= most
                require(inside, f"channel.{name}", value, f"in {least:g}..{most:g} for {model}")
            for name in ("trace_file", "trace_uplink_file"):
                allowed = "null unless channel.path_loss=trace"
                require(
                    getattr(self, name) is None, f"channel.{name}", getattr(self, name), allowed
                )
