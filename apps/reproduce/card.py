"""CARD: delay against training on devices alone, server energy against the server alone."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from fedsplit.strategies.card import Card
from omegaconf import DictConfig

from fedsplit.fleet import timeline
from fedsplit.flower import System
from fedsplit.plan import RoundPlan, Route
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


def reproduce(overrides: Sequence[str]) -> Reproduction:
    """Compare CARD's rounds with the two extremes: all on the devices, all on the server."""
    config = paper_config(PAPER, overrides)
    system = paper_scenario(PAPER, overrides, "strategy=card").system
    scenes = [scene(config, system, index) for index in range(1, config.paper.rounds + 1)]
    weight, min_cut = config.paper.delay_weight, config.paper.min_cut
    private = max(min_cut, 1)
    cases = {
        "device only": sequential(scenes, Route.device_only(system.profile.n_blocks)),
        "server only": sequential(scenes, Route.two_tier(system.profile.n_blocks, min_cut)),
        "CARD": planned(scenes, Card(weight, min_cut)),
        "CARD, one goal for the round": planned(scenes, Card(weight, min_cut, jointly=True)),
        f"CARD, {private} block on the device": planned(scenes, Card(weight, private)),
    }
    private_name = list(cases)[-1]
    sweep = [float(value) for value in config.paper.sweep_delay_weight]
    curve = [planned(scenes, Card(value, min_cut)) for value in sweep]
    delay = {name: case[0] for name, case in cases.items()}
    energy = {name: case[1] for name, case in cases.items()}
    joint = "one weighted sum over the whole round (jointly)"
    return Reproduction(
        PAPER,
        (
            Figure(
                "training delay",
                "-70.8 %",
                "device only",
                change(delay["CARD"], delay["device only"]),
                (-100.0, -70.8),
                change(delay["CARD, one goal for the round"], delay["device only"]),
                joint,
            ),
            Figure(
                "server energy",
                "-53.1 %",
                "server only, at its highest clock",
                change(energy["CARD"], energy["server only"]),
                (-100.0, -53.1),
                change(energy["CARD, one goal for the round"], energy["server only"]),
                joint,
            ),
            Figure(
                f"training delay, {private} block stays on the device",
                "none",
                "device only",
                change(delay[private_name], delay["device only"]),
            ),
            Figure(
                f"server energy, {private} block stays on the device",
                "none",
                "server only, at its highest clock",
                change(energy[private_name], energy["server only"]),
            ),
        ),
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


def scene(config: DictConfig, system: System, server_round: int) -> Scene:
    """Return a round whose signal-to-noise ratios over the whole band are drawn in dB."""
    n_devices = system.fleet.n_devices
    drawn = generator(config.seed, "reproduce", PAPER, server_round)
    low, high = config.paper.snr_db
    snr = db_to_linear(drawn.uniform(low, high, n_devices))
    band_hz = float(config.channel.bandwidth_hz)
    # Unit power and noise: the gain alone is the signal-to-noise ratio times the band.
    gain = snr * band_hz
    channel = ChannelState(gain, gain, np.ones(n_devices), 1.0, 1.0, band_hz, band_hz)
    samples = dict(enumerate(system.fleet.samples.tolist()))
    return replace(system.scene(server_round, samples), channel=channel)


def planned(scenes: Sequence[Scene], scheme: Card) -> tuple[float, float]:
    """Return the mean delay of a round in seconds, and the server's energy in joules."""
    return costs(scenes, [scheme.plan_round(one) for one in scenes])


def sequential(scenes: Sequence[Scene], route: Route) -> tuple[float, float]:
    """Return the same for devices that train one after the other on one route."""
    plans = [RoundPlan.sequential(one.turn(n, route) for n in one.devices) for one in scenes]
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
