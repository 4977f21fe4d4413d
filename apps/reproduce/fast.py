"""Fast splitting: a cut for each device and round, against the best cuts that never move."""

from dataclasses import replace

import numpy as np
from omegaconf import DictConfig

from fedsplit.flower import System
from fedsplit.models import ModelSpec
from fedsplit.models.profile import profile_graph
from fedsplit.planning import CutLimits, CutSolver, CutSystem
from fedsplit.planning.cut_cost import cut_weights
from fedsplit.planning.exhaustive import every_cut
from fedsplit.wireless import downlink_bps, uplink_bps

from ..scenario import build_system
from .study import EACH, Case, model


def add(case: Case) -> None:
    """Add the delay of a turn by scheme, of each model and of all, and how far from the optimum."""
    config, system = case.config, build_system(case.config)
    gaps = []
    for name in config.paper.models:
        delays, gap = compare(config, system, model(config, name))
        gaps.append(gap)
        case.x[EACH].append(name)
        for scheme, delay in delays.items():
            case.add(name, scheme, delay)
            case.add("delay_s", scheme, delay)
    case.add("gap", "fast", 100 * max(gaps))


def compare(config: DictConfig, system: System, spec: ModelSpec) -> tuple[dict[str, float], float]:
    """Return each scheme's mean delay for a model, and how far fast is from the best of all."""
    graph = profile_graph(spec, config.paper.seq_len, batch=2)
    floor = config.paper.min_blocks
    every = every_cut(graph, floor)
    sent = np.array([graph.crossing(part) for part in every])
    solver, limits = CutSolver(graph), CutLimits(min_blocks=floor)
    settings = cut_systems(config, system)
    halved = [replace(one, uplink_ratio=0.5, downlink_ratio=0.5) for one in settings]
    fast, compressed = (
        np.array([solver.solve(one, limits).objective for one in chosen])
        for chosen in (settings, halved)
    )
    weights = [cut_weights(graph, one) for one in settings]
    cost = np.array([every @ w.device + ~every @ w.server + sent @ w.transfer for w in weights])
    size = every.sum(axis=1)
    by_device = cost.reshape(-1, system.fleet.n_devices, cost.shape[1]).mean(axis=0)
    delays = {
        "fast": fast.mean(),
        "fast, bf16": compressed.mean(),
        "best static cut": cost.mean(axis=0).min(),
        "best static cut of each device": by_device.min(axis=1).mean(),
        "device only": cost[:, size.argmax()].mean(),
        "most on the server": cost[:, size.argmin()].mean(),
        "random cut": cost.mean(),
    }
    return delays, float(np.abs(fast / cost.min(axis=1) - 1).max())


def cut_systems(config: DictConfig, system: System) -> list[CutSystem]:
    """Return every device in every round, with the whole band to itself."""
    fleet, found = system.fleet, list[CutSystem]()
    for server_round in range(1, config.rounds + 1):
        state = system.channel.realise(server_round)
        up, down = uplink_bps(state, state.uplink_hz), downlink_bps(state, state.downlink_hz)
        found += [
            CutSystem(
                device_flops_per_s=flops,
                server_flops_per_s=float(fleet.servers.flops[0]),
                uplink_bps=up_bps,
                downlink_bps=down_bps,
                steps=config.train.steps,
                batch=config.train.batch_size,
            )
            for flops, up_bps, down_bps in np.column_stack((fleet.devices.flops, up, down)).tolist()
        ]
    return found
