"""CARD: delay against training on devices alone, server energy against the server alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from fedsplit.strategies.card import Card
from omegaconf import DictConfig

from fedsplit.fleet import timeline
from fedsplit.flower import System
from fedsplit.plan import RoundPlan, Route
from fedsplit.planning import CutCosts, devices_of
from fedsplit.schemes import Scene
from fedsplit.seeds import generator
from fedsplit.wireless import ChannelState, db_to_linear

from .common import (
    Chart,
    Figure,
    Reproduction,
    change,
    paper_config,
    paper_scenario,
)

PAPER = "card"
_JOINTLY = "CARD, one goal for the round"
_BETTER = "one weighted sum over the whole round (jointly)"
_GAIN = "the server does all, at a clock below its highest; a constant clock does the same"
_PRIVATE_GAIN = (
    "the fastest device keeps all blocks in all rounds, the others one: constant as well"
)


def reproduce(overrides: Sequence[str]) -> Reproduction:
    """Compare CARD's rounds with the two extremes: all on the devices, all on the server."""
    config = paper_config(PAPER, overrides)
    system = paper_scenario(PAPER, overrides, "strategy=card").system
    scenes = [scene(config, system, index) for index in range(1, config.paper.rounds + 1)]
    weight, min_cut = config.paper.delay_weight, config.paper.min_cut
    private = max(min_cut, 1)
    kept = f", {private} block stays on the device"
    cases = {
        "device only": sequential(scenes, Route.device_only(system.profile.n_blocks)),
        "server only": sequential(scenes, Route.two_tier(system.profile.n_blocks, min_cut)),
        "CARD": planned(scenes, Card(weight, min_cut)),
        _JOINTLY: planned(scenes, Card(weight, min_cut, jointly=True)),
        kept: planned(scenes, Card(weight, private)),
    }
    sweep = [float(value) for value in config.paper.sweep_delay_weight]
    curve = [planned(scenes, Card(value, min_cut)) for value in sweep]
    delay = {name: case[0] for name, case in cases.items()}
    energy = {name: case[1] for name, case in cases.items()}

    def figures(name: str, where: str, least_cut: int, judged: bool) -> tuple[Figure, Figure]:
        fixed = constants(scenes, least_cut)
        tuned = config.paper.tuned
        return (
            Figure(
                name=f"training delay{where}",
                claim="-70.8 %" if judged else "none",
                versus="device only",
                ours=change(delay[name], delay["device only"]),
                strongest="the best constant cut and clock with CARD's energy",
                against_strongest=change(
                    delay[name], min(one.delay_s(energy[name]) for one in fixed)
                ),
                gain=_GAIN if judged else _PRIVATE_GAIN,
                tuned=tuned,
                accepted=(-100.0, -70.8) if judged else None,
                ours_better=change(delay[_JOINTLY], delay["device only"]) if judged else None,
                better=_BETTER,
            ),
            Figure(
                name=f"server energy{where}",
                claim="-53.1 %" if judged else "none",
                versus="server only, at its highest clock",
                ours=change(energy[name], energy["server only"]),
                strongest="the best constant cut and clock with CARD's delay",
                against_strongest=change(
                    energy[name], min(one.energy_j(delay[name]) for one in fixed)
                ),
                gain=_GAIN if judged else _PRIVATE_GAIN,
                tuned=tuned,
                accepted=(-100.0, -53.1) if judged else None,
                ours_better=change(energy[_JOINTLY], energy["server only"]) if judged else None,
                better=_BETTER,
            ),
        )

    return Reproduction(
        PAPER,
        (*figures("CARD", "", min_cut, True), *figures(kept, kept, private, False)),
        (
            Chart(
                "Delay and server energy",
                "weight of the delay",
                "percent of the baseline",
                sweep,
                {
                    "delay / device only": [100 * d / delay["device only"] for d, _ in curve],
                    "energy / server only": [100 * e / energy["server only"] for _, e in curve],
                },
            ),
        ),
        (
            "Bandwidth and weight were tuned to both claims on a simpler model of costs; here they "
            "are kept, and the model is counted operation by operation. That the definitions can "
            "give the claims is shown, not that the authors' settings do.",
        ),
        config.paper.provenance,
    )


@dataclass(frozen=True)
class Constant:
    """A cut that is the same for all devices and rounds, under a clock that is too.

    In the clock f the mean delay of a round is ``base_s + cycles / f`` and the server's energy
    ``top_j (f / top_hz)^2``.

    Parameters
    ----------
    base_s, cycles, top_j : float
        The constants.
    low_hz, top_hz : float
        Range of the clock.
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


def constants(scenes: Sequence[Scene], min_cut: int) -> list[Constant]:
    """Return every cut that fits all devices and uses the server."""
    first = scenes[0]
    fleet, n_blocks = first.fleet, first.n_blocks
    costs_of = CutCosts.from_profile(first.profile, first.work.batch_size, device_only=True)
    allowed = devices_of(fleet, 1).allowed_cuts(costs_of.only(first.cuts), min_cut)
    fits = np.asarray(allowed.all(axis=0))
    low_hz, top_hz = float(fleet.servers.min_hz[0]), float(fleet.servers.clock_hz[0])
    found = []
    for cut in np.flatnonzero(fits[:-1]).tolist():
        route = Route.two_tier(n_blocks, cut)
        low_s, _ = sequential(scenes, route, low_hz)
        top_s, top_j = sequential(scenes, route, top_hz)
        cycles = (low_s - top_s) / (1 / low_hz - 1 / top_hz)
        found.append(Constant(top_s - cycles / top_hz, cycles, top_j, low_hz, top_hz))
    return found


def scene(config: DictConfig, system: System, server_round: int) -> Scene:
    """Return a round whose signal-to-noise ratios over the whole band are drawn in dB."""
    n_devices = system.fleet.n_devices
    drawn = generator(config.seed, "reproduce", PAPER, server_round)
    low, high = config.paper.snr_db
    snr = db_to_linear(drawn.uniform(low, high, n_devices))
    band_hz = float(config.channel.bandwidth_hz)
    # Unit power and noise: the gain alone is the signal-to-noise ratio times the band.
    gain = snr * band_hz
    channel = ChannelState(
        gain_up=gain,
        gain_down=gain,
        power_up_w=np.ones(n_devices),
        power_down_w=1.0,
        noise_w_hz=1.0,
        uplink_hz=band_hz,
        downlink_hz=band_hz,
    )
    samples = dict(enumerate(system.fleet.samples.tolist()))
    return replace(system.scene(server_round, samples), channel=channel)


def planned(scenes: Sequence[Scene], scheme: Card) -> tuple[float, float]:
    """Return the mean delay of a round in seconds, and the server's energy in joules."""
    return costs(scenes, [scheme.plan_round(one) for one in scenes])


def sequential(
    scenes: Sequence[Scene], route: Route, server_hz: float | None = None
) -> tuple[float, float]:
    """Return the same for devices that train one after the other on one route, at one clock."""
    plans = [
        RoundPlan.sequential(replace(one.turn(n, route), server_hz=server_hz) for n in one.devices)
        for one in scenes
    ]
    return costs(scenes, plans)


def costs(scenes: Sequence[Scene], plans: Sequence[RoundPlan]) -> tuple[float, float]:
    """Return mean delay and server energy of rounds on the modelled system.

    The server's energy is that of its processor, as in the paper; its radio is not counted.
    """
    found = [
        timeline(plan, one.profile, one.fleet, one.channel, one.work.batch_size).cost
        for one, plan in zip(scenes, plans, strict=True)
    ]
    delay_s = float(np.mean([cost.delay_s for cost in found]))
    return delay_s, float(np.mean([cost.server_compute_j.sum() for cost in found]))
