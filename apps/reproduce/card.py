"""CARD: delay against training on devices alone, server energy against the server alone."""

from dataclasses import dataclass, replace

import numpy as np
from omegaconf import DictConfig

from fedsplit.arrays import Array
from fedsplit.fleet import Fleet
from fedsplit.seeds import generator
from fedsplit.wireless import Channel, ChannelSpec, ChannelState, db_to_linear

from .study import Case


def add(case: Case) -> None:
    """Cost all members, and the best cuts and clocks that never change."""
    case.cost(lambda system: replace(system, channel=DrawnLinks(case.config, system.fleet)))
    delay, energy = case.values["delay_s"], case.values["server_compute_j"]
    for name, ours, least in (("constant", "CARD", 0), ("constant, private", "CARD, private", 1)):
        allowed = constants(case, least)
        case.add("delay_s", name, allowed.delay_s(energy[ours]))
        case.add("server_compute_j", name, allowed.energy_j(delay[ours]))


@dataclass(frozen=True, eq=False, kw_only=True)
class Constants:
    """Cuts that are the same for all devices and rounds, each under a clock that is too.

    In the clock f, from `low_hz` to `top_hz`, the mean delay of a round is ``base_s + cycles / f``
    and the server's energy ``top_j (f / top_hz)^2``, with a number for each cut.
    """

    base_s: Array
    cycles: Array
    top_j: Array
    low_hz: float
    top_hz: float

    def delay_s(self, energy_j: Array) -> Array:
        """Return the least delay that needs no more than this energy; infinite if none does."""
        clock_hz = self.top_hz * np.minimum(np.sqrt(energy_j / self.top_j), 1.0)
        delay_s = self.base_s + self.cycles / clock_hz
        return np.array(np.where(clock_hz >= self.low_hz, delay_s, np.inf).min())

    def energy_j(self, delay_s: Array) -> Array:
        """Return the least energy that needs no more than this delay; infinite if none does."""
        late = delay_s < self.base_s + self.cycles / self.top_hz
        clock_hz = np.maximum(self.cycles / (delay_s - self.base_s), self.low_hz)
        return np.array(np.where(late, np.inf, self.top_j * (clock_hz / self.top_hz) ** 2).min())


def constants(case: Case, least: int) -> Constants:
    """Return the cuts that leave `least` blocks to the devices, fit them and use the server."""
    servers = case.scenarios["CARD"].system.fleet.servers
    low_hz, top_hz = float(servers.min_hz[0]), float(servers.clock_hz[0])
    delay, name = case.values["delay_s"], "constant by cut"
    fits = case.values["devices_over_memory"][name] == 0
    allowed = fits & (np.array(case.x[name]) >= least)
    top_s = delay[name][allowed]
    cycles = (delay[f"{name}, slowest"][allowed] - top_s) / (1 / low_hz - 1 / top_hz)
    return Constants(
        base_s=top_s - cycles / top_hz,
        cycles=cycles,
        top_j=case.values["server_compute_j"][name][allowed],
        low_hz=low_hz,
        top_hz=top_hz,
    )


class DrawnLinks(Channel):
    """Signal-to-noise ratios over the whole band, drawn in dB for each device and round."""

    def __init__(self, config: DictConfig, fleet: Fleet) -> None:
        band_hz = float(config.channel.bandwidth_hz)
        super().__init__(ChannelSpec(bandwidth_hz=band_hz), fleet.devices.positions_m)
        self._config = config

    def realise(self, round_: int, step: int | None = None) -> ChannelState:
        """Return the links in a round, the same ones in all its steps."""
        state = super().realise(round_)
        drawn = generator(self._config.seed, "reproduce", "card", round_)
        low, high = self._config.paper.snr_db
        gain_w = db_to_linear(drawn.uniform(low, high, state.n_devices)) * state.noise_w_hz
        gain_up = gain_w * state.uplink_hz / state.power_up_w
        gain_down = gain_w * state.downlink_hz / state.power_down_w
        return replace(state, gain_up=gain_up, gain_down=gain_down)
