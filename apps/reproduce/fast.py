"""Fast splitting: a cut for each device and round, against the best cuts that never move."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from fedsplit.arrays import Array
from fedsplit.errors import require
from fedsplit.flower import System
from fedsplit.layergraph import LayerGraph
from fedsplit.mapping import from_mapping
from fedsplit.models import ModelSpec
from fedsplit.models.profile import profile_graph
from fedsplit.planning import CutLimits, CutSolver, CutSystem
from fedsplit.planning.cut_cost import cut_weights
from fedsplit.wireless import downlink_bps, uplink_bps

from ..scenario import build_system
from ..values import plain
from .common import Chart, Figure, Reproduction, change, paper_config

PAPER = "fast"
BASELINES = ("best static cut", "device only", "most on the server", "random cut")
PER_DEVICE = "best static cut of each device"
_BEST, _DEEPEST = "fast", 1e-9
_HINDSIGHT = f"{PER_DEVICE}, chosen with all rounds known"
_GAIN = "each of four kinds of boards has its own cut; little is from cuts that follow the channel"


@dataclass(frozen=True)
class Comparison:
    """Mean delay of a turn by scheme, and the largest distance from exhaustive search."""

    delay_s: dict[str, float]
    gap: float
    codec_s: float


def reproduce(overrides: Sequence[str]) -> Reproduction:
    """Compare the delay of a turn, mean over devices and rounds, on several models."""
    config = paper_config(PAPER, overrides)
    system = build_system(config)
    found = {
        name: compare(config, system, from_mapping(ModelSpec, plain(spec), f"paper.models.{name}"))
        for name, spec in config.paper.models.items()
    }

    def gain(name: str, baseline: str) -> float:
        return change(found[name].delay_s[_BEST], found[name].delay_s[baseline])

    def mean_gain(baseline: str) -> float:
        return float(np.mean([gain(name, baseline) for name in found]))

    tuned, strongest = config.paper.tuned, mean_gain(PER_DEVICE)

    with_codec = [change(one.codec_s, one.delay_s[BASELINES[0]]) for one in found.values()]
    gap = max(one.gap for one in found.values())
    return Reproduction(
        PAPER,
        (
            *(
                Figure(
                    name="training delay, mean over models",
                    claim="-24.62 to -38.95 % (v1), up to -38.95 % (v4)",
                    versus=baseline,
                    ours=mean_gain(baseline),
                    strongest=_HINDSIGHT,
                    against_strongest=strongest,
                    gain=_GAIN,
                    tuned=tuned,
                    accepted=(-100.0, -24.62) if baseline == BASELINES[0] else None,
                    ours_better=float(np.mean(with_codec)) if baseline == BASELINES[0] else None,
                    better="boundaries in bf16, which the cut takes into account",
                )
                for baseline in BASELINES
            ),
            *(
                Figure(
                    name=f"training delay of {name}",
                    claim="none",
                    versus=BASELINES[0],
                    ours=gain(name, BASELINES[0]),
                    strongest=_HINDSIGHT,
                    against_strongest=gain(name, PER_DEVICE),
                    gain=_GAIN,
                    tuned=tuned,
                )
                for name in found
            ),
            Figure(
                name="delay beyond that of exhaustive search",
                claim="optimal",
                versus="all cuts of all models",
                ours=100 * gap,
                strongest="the same",
                against_strongest=100 * gap,
                gain="nothing is gained: a minimum s-t cut is the optimum",
                accepted=(-100 * _DEEPEST, 100 * _DEEPEST),
            ),
        ),
        (
            Chart(
                "Delay of a turn",
                "",
                "relative to the best static cut",
                tuple(found),
                {
                    scheme: [
                        one.delay_s[scheme] / one.delay_s[BASELINES[0]] for one in found.values()
                    ]
                    for scheme in (_BEST, BASELINES[0], PER_DEVICE, BASELINES[1])
                },
            ),
        ),
        (
            "How much a moving cut gains depends on the model: nothing where one cut is best on "
            "every channel. Against one cut for all it gains what different boards ask for, which "
            "a static cut for each board gains too. Static cuts are chosen with all rounds known, "
            "which no real scheme can.",
        ),
        config.paper.provenance,
    )


def compare(config: DictConfig, system: System, spec: ModelSpec) -> Comparison:
    """Return what every scheme costs for one model, all possible cuts tried."""
    graph = profile_graph(spec, config.paper.seq_len, batch=2)
    floor = config.paper.min_blocks
    every = every_cut(graph, floor)
    sent = np.zeros_like(every)
    for parent, child in graph.edges:
        sent[:, parent] |= every[:, parent] & ~every[:, child]
    solver, limits = CutSolver(graph), CutLimits(min_blocks=floor)
    costs: list[Array] = []
    chosen: list[float] = []
    compressed: list[float] = []
    for ratio, found in ((1.0, chosen), (0.5, compressed)):
        for setting in cut_systems(config, system, ratio):
            found.append(solver.solve(setting, limits).objective)
            if ratio == 1.0:
                weights = cut_weights(graph, setting)
                costs.append(
                    every @ weights.device + ~every @ weights.server + sent @ weights.transfer
                )
    cost, fast = np.array(costs), np.array(chosen)
    size, n_devices = every.sum(axis=1), system.fleet.n_devices
    by_device = cost.reshape(-1, n_devices, cost.shape[1]).mean(axis=0)
    delays = (
        cost.mean(axis=0).min(),
        cost[:, size.argmax()].mean(),
        cost[:, size.argmin()].mean(),
        cost.mean(),
    )
    return Comparison(
        {
            _BEST: float(fast.mean()),
            PER_DEVICE: float(by_device.min(axis=1).mean()),
            **dict(zip(BASELINES, map(float, delays), strict=True)),
        },
        float(np.abs(fast / cost.min(axis=1) - 1).max()),
        float(np.mean(compressed)),
    )


def cut_systems(config: DictConfig, system: System, ratio: float) -> list[CutSystem]:
    """Return every device in every round, with the whole band to itself."""
    fleet, found = system.fleet, []
    for server_round in range(1, config.paper.rounds + 1):
        state = system.channel.realise(server_round)
        up, down = uplink_bps(state, state.uplink_hz), downlink_bps(state, state.downlink_hz)
        found += [
            CutSystem(
                device_flops_per_s=float(fleet.devices.flops[device]),
                server_flops_per_s=float(fleet.servers.flops[0]),
                uplink_bps=float(up[device]),
                downlink_bps=float(down[device]),
                steps=config.train.steps,
                batch=config.train.batch_size,
                uplink_ratio=ratio,
                downlink_ratio=ratio,
            )
            for device in range(fleet.n_devices)
        ]
    return found


def every_cut(graph: LayerGraph, min_blocks: int, most: int | None = None) -> NDArray[np.bool_]:
    """Return all possible device parts with the first blocks in them, shape ``[cuts, n]``.

    Raises
    ------
    FedsplitError
        If they have more than `most` entries on the way.
    """
    needs: list[list[int]] = [[] for _ in range(graph.n)]
    for vertex, needed in [*graph.edges[:, ::-1].tolist(), *graph.requires.tolist()]:
        needs[vertex].append(needed)
    parts = [np.zeros(graph.n, dtype=bool)]
    for vertex in range(graph.n):
        longer = []
        for part in parts:
            if part[needs[vertex]].all():
                extended = part.copy()
                extended[vertex] = True
                longer.append(extended)
        stays = vertex < graph.n_inputs or (min_blocks > 0 and graph.block[vertex] < min_blocks)
        parts = longer if stays else parts + longer
        size = len(parts) * graph.n
        require(most is None or size <= most, "device parts", size, f"at most {most}")
    return np.array(parts)
