"""From a fleet and its channel to the arrays that planners read."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from fedsplit.arrays import Array
from fedsplit.fleet import Fleet
from fedsplit.planning.card import ServerClock
from fedsplit.planning.costs import Devices
from fedsplit.wireless import ChannelState, db_to_linear, downlink_bps


def devices_of(fleet: Fleet, steps: ArrayLike, members: Sequence[int] | None = None) -> Devices:
    """Return the devices of a fleet (all, or `members`) with this many mini-batches each."""
    which = np.arange(fleet.n_devices) if members is None else np.asarray(members)
    return Devices(fleet.devices.flops[which], fleet.devices.memory_bytes[which], steps)


def server_of(fleet: Fleet) -> ServerClock:
    """Return the cloud or only server of a fleet."""
    nodes = fleet.servers
    return ServerClock(
        float(nodes.flops_per_cycle[0]),
        float(nodes.min_hz[0]),
        float(nodes.clock_hz[0]),
        float(nodes.energy_coefficient[0]),
    )


def uplink_snr_hz(state: ChannelState) -> Array:
    """Return ``gain * power / noise density`` of every uplink, Hz, shape ``[N]``.

    Less the channel's distance from capacity. Planners divide bands by Shannon's formula; with a
    table of modulation schemes the plan is that of the capacity the table approximates.
    """
    snr: Array = state.gain_up * state.power_up_w / state.noise_w_hz / db_to_linear(state.gap_db)
    return snr


def downlink_efficiency(state: ChannelState) -> Array:
    """Return the bit/s per hertz of every downlink, shape ``[N]``; its power is spread evenly."""
    return downlink_bps(state, 1.0)
