"""CARD: delay against training on devices alone, server energy against the server alone."""

from dataclasses import dataclass, replace

import numpy as np
from omegaconf import DictConfig

from fedsplit.arrays import Array
from fedsplit.flower import System
from fedsplit.seeds import generator
from fedsplit.wireless import Channel, ChannelSpec, ChannelState, db_to_linear

from .study import Case


def add(case: Case) -> dict[str, object]:
    """Cost all members, and the best cuts and clocks that never change."""

    def drawn(system: System) -> System:
        return replace(system, channel=DrawnLinks(case.config, system.fleet.devices.positions_m))

    case.cost(drawn)
    delay, energy = case.values["delay_s"], case.values["server_compute_j"]
    for name, ours, least in (("constant", "CARD", 0), ("constant, private", "CARD, private", 1)):
        allowed = constants(case, least)
        least_s = min(one.delay_s(energy[ours].item()) for one in allowed)
        least_j = min(one.energy_j(delay[ours].item()) for one in allowed)
        delay[name], energy[name] = np.array(least_s), np.array(least_j)
    return {}


@dataclass(frozen=True)
class Constant:
    """A cut that is the same for all devices and rounds, under a clock that is too.

    In the clock f, from `low_hz` to `top_hz`, the mean delay of a round is ``base_s + cycles / f``
    and the server's energy ``top_j (f / top_hz)^2``.
    """

    base_s: float
    cycles: float
    top_j: float
    low_hz: float
    top_hz: float

    def delay_s(self, energy_j: float) -> float:
        """Return the least delay that needs no more than this energy; infinite if none does."""
        clock_hz = self.top_hz * min(float(np.sqrt(energy_j / self.top_j)), 1.0)
        return self.base_s + self.cycles / clock_hz if clock_hz >= self.low_hz else np.inf

    def energy_j(self, delay_s: float) -> float:
        """Return the least energy that needs no more than this delay; infinite if none does."""
        if delay_s < self.base_s + self.cycles / self.top_hz:
            return np.inf
        clock_hz = max(self.cycles / (delay_s - self.base_s), self.low_hz)
        return self.top_j * (clock_hz / self.top_hz) ** 2


def constants(case: Case, least: int) -> list[Constant]:
    """Return every cut that leaves `least` blocks to the devices, fits them and uses the server."""
    servers = case.scenarios["CARD"].system.fleet.servers
    low_hz, top_hz = float(servers.min_hz[0]), float(servers.clock_hz[0])
    fastest, slowest = "constant by cut", "constant by cut, slowest"
    low_s, top_s = (case.values["delay_s"][name] for name in (slowest, fastest))
    fits = case.values["devices_over_memory"][fastest] == 0
    cycles = (low_s - top_s) / (1 / low_hz - 1 / top_hz)
    columns = (top_s - cycles / top_hz, cycles, case.values["server_compute_j"][fastest])
    allowed = fits & (np.array(case.x[fastest]) >= least)
    rows = np.column_stack(columns)[allowed].tolist()
    return [Constant(base_s, held, top_j, low_hz, top_hz) for base_s, held, top_j in rows]


class DrawnLinks(Channel):
    """Signal-to-noise ratios over the whole band, drawn in dB for each device and round."""

    def __init__(self, config: DictConfig, positions_m: Array) -> None:
        super().__init__(ChannelSpec(), positions_m)
        self._config = config

    def realise(self, round_: int, step: int | None = None) -> ChannelState:
        """Return the links in a round, the same ones in all its steps."""
        config, n_devices = self._config, len(self._start_m)
        drawn = generator(config.seed, "reproduce", "card", round_)
        band_hz = float(config.channel.bandwidth_hz)
        # Unit power and noise: the gain alone is the signal-to-noise ratio times the band.
        low, high = config.paper.snr_db
        gain = db_to_linear(drawn.uniform(low, high, n_devices)) * band_hz
        return ChannelState(
            gain_up=gain,
            gain_down=gain,
            power_up_w=np.ones(n_devices),
            power_down_w=1.0,
            noise_w_hz=1.0,
            uplink_hz=band_hz,
            downlink_hz=band_hz,
        )
