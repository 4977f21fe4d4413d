"""FedsLLM: training time with learning accuracy and both bands optimised."""

from dataclasses import replace

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from fedsplit.mapping import from_mapping
from fedsplit.planning import FedsllmProblem, LearningCurve, plan_fedsllm, uplink_snr_hz
from fedsplit.seeds import generator
from fedsplit.wireless import Channel, ChannelSpec

from ..values import plain
from .study import Case


def add(case: Case) -> None:
    """Add every scheme's total delay over the sweeps of bands and of powers."""
    paper, channel = case.config.paper, case.config.channel
    bands = [float(band) for band in paper.sweep_bandwidth_hz]
    powers = [float(power) for power in paper.sweep_device_dbm]
    fleets = range(case.config.seed * paper.fleets, (case.config.seed + 1) * paper.fleets)
    band_hz, dbm = float(channel.bandwidth_hz), float(channel.device_dbm)
    for metric, settings in (
        ("over_bands", [(one, dbm) for one in bands]),
        ("over_powers", [(band_hz, one) for one in powers]),
    ):
        for one in settings:
            drawn = pd.DataFrame([delays_s(case.config, *one, seed) for seed in fleets])
            for name, delays in drawn.items():
                case.add(metric, str(name), delays.to_list())
    case.x |= {"band_hz": bands, "dbm": powers}
    case.words["sweep"] = f"{bands[0] / 1e6:g} to {bands[-1] / 1e6:g} MHz"
    case.words["powers"] = f"{powers[0]:g} to {powers[-1]:g} dBm at {band_hz / 1e6:g} MHz"


def delays_s(config: DictConfig, band_hz: float, device_dbm: float, seed: int) -> dict[str, float]:
    """Return each scheme's total delay for one fleet."""
    accuracy, problem = config.paper.accuracy, problem_of(config, band_hz, device_dbm, seed)
    compressed = replace(problem, smashed_bits=0.5 * np.asarray(problem.smashed_bits))
    plans = {
        "FedsLLM": plan_fedsllm(problem),
        "unoptimised": plan_fedsllm(problem, accuracy, equal_bandwidth=True),
        "equal bands and eta 1/2": plan_fedsllm(problem, 0.5, equal_bandwidth=True),
        "equal bands and best eta": plan_fedsllm(problem, equal_bandwidth=True),
        "best bands and eta": plan_fedsllm(problem, accuracy),
        "smashed data in bf16": plan_fedsllm(compressed),
    }
    return {name: plan.total_s for name, plan in plans.items()}


def problem_of(config: DictConfig, band_hz: float, device_dbm: float, seed: int) -> FedsllmProblem:
    """Return a random fleet of the paper's kind; both servers are at the same place."""
    paper = config.paper
    rng = generator(seed, "reproduce", "fedsllm")
    places = rng.uniform(-paper.side_m / 2, paper.side_m / 2, (paper.clients, 2))
    settings = plain(config.channel) | {"bandwidth_hz": band_hz, "device_dbm": device_dbm}
    spec = from_mapping(ChannelSpec, settings, "channel")
    state = Channel(spec, places, np.zeros(2), seed).realise(1)
    low, high = (float(cycles) for cycles in paper.cycles)
    cycles = paper.samples * rng.uniform(low, high, paper.clients)
    snr_hz = uplink_snr_hz(state)
    return FedsllmProblem(
        device_s=paper.client_share * cycles / float(paper.clock_hz),
        smashed_bits=float(paper.smashed_bits),
        adapter_bits=float(paper.adapter_bits),
        main_snr_hz=snr_hz,
        fed_snr_hz=snr_hz,
        main_hz=band_hz,
        fed_hz=band_hz,
        learning=LearningCurve.from_constants(**{k: float(v) for k, v in paper.learning.items()}),
    )
