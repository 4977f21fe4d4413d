"""Fast splitting: a cut for each device and round, against the best cuts that never move."""

import numpy as np
from omegaconf import DictConfig

from fedsplit.arrays import Array
from fedsplit.flower import System
from fedsplit.mapping import from_mapping
from fedsplit.models import ModelSpec
from fedsplit.models.profile import profile_graph
from fedsplit.planning import CutLimits, CutSolver, CutSystem
from fedsplit.planning.cut_cost import cut_weights
from fedsplit.planning.exhaustive import every_cut
from fedsplit.wireless import downlink_bps, uplink_bps

from ..scenario import build_system
from ..values import plain
from .study import EACH, Case


def add(case: Case) -> dict[str, object]:
    """Add the delay of a turn by scheme, of each model and of all, and how far from the optimum."""
    config, system = case.config, build_system(case.config)
    gaps = []
    for name, spec in config.paper.models.items():
        model = from_mapping(ModelSpec, plain(spec), f"paper.models.{name}")
        delays, gap = compare(config, system, model)
        case.values[name] = {scheme: np.array([delay]) for scheme, delay in delays.items()}
        gaps.append(gap)
    case.x[EACH] = list(config.paper.models)
    models = [case.values[name] for name in config.paper.models]
    case.values["delay_s"] = {
        scheme: np.concatenate([one[scheme] for one in models]) for scheme in models[0]
    }
    case.values["gap"]["fast"] = np.array(100 * max(gaps))
    return {}


def compare(config: DictConfig, system: System, spec: ModelSpec) -> tuple[dict[str, float], float]:
    """Return each scheme's mean delay for a model, and how far fast is from the best of all."""
    graph = profile_graph(spec, config.paper.seq_len, batch=2)
    floor = config.paper.min_blocks
    every = every_cut(graph, floor)
    sent = np.zeros_like(every)
    for parent, child in graph.edges:
        sent[:, parent] |= every[:, parent] & ~every[:, child]
    solver, limits = CutSolver(graph), CutLimits(min_blocks=floor)
    settings = cut_systems(config, system, 1.0)
    fast, compressed = (
        np.array([solver.solve(one, limits).objective for one in chosen])
        for chosen in (settings, cut_systems(config, system, 0.5))
    )
    costs: list[Array] = []
    for one in settings:
        weights = cut_weights(graph, one)
        costs.append(every @ weights.device + ~every @ weights.server + sent @ weights.transfer)
    cost, size = np.array(costs), every.sum(axis=1)
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


def cut_systems(config: DictConfig, system: System, ratio: float) -> list[CutSystem]:
    """Return every device in every round, with the whole band to itself."""
    fleet, found = system.fleet, []
    for server_round in range(1, config.rounds + 1):
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
