"""The radio model: path loss, shadowing, fading, movement, rates and measured traces."""

from fedsplit.wireless.channel import Channel, ChannelState, downlink_bps, uplink_bps
from fedsplit.wireless.pathloss import (
    SCENARIOS,
    Scenario,
    line_of_sight_probability,
    path_loss_db,
    shadowing_sigma_db,
)
from fedsplit.wireless.rate import RATE_MODELS, db_to_linear, dbm_to_watt, spectral_efficiency
from fedsplit.wireless.spec import ChannelSpec, FadingSpec, MobilitySpec
from fedsplit.wireless.trace import Trace, read_trace

__all__ = [
    "RATE_MODELS",
    "SCENARIOS",
    "Channel",
    "ChannelSpec",
    "ChannelState",
    "FadingSpec",
    "MobilitySpec",
    "Scenario",
    "Trace",
    "db_to_linear",
    "dbm_to_watt",
    "downlink_bps",
    "line_of_sight_probability",
    "path_loss_db",
    "read_trace",
    "shadowing_sigma_db",
    "spectral_efficiency",
    "uplink_bps",
]
