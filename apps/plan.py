"""``fedsplit plan``: what a scheme would cost, round by round, without training anything."""

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from apps.config import codec_plan, config_dir, load_config, local_work, model_spec, plain
from apps.plan_report import RoundRow, comparison_table, write_results
from apps.server_app import build_strategy
from fedsplit.codec import make_codec
from fedsplit.errors import FedsplitError
from fedsplit.fleet import (
    CodecRatio,
    Fleet,
    FleetSpec,
    Timeline,
    build_fleet,
    timeline,
    write_chrome_trace,
    write_gantt,
    write_json,
)
from fedsplit.flower import Scene
from fedsplit.mapping import from_mapping, to_mapping
from fedsplit.models import ModelSpec
from fedsplit.models.profile import profile_model
from fedsplit.plan import RoundPlan
from fedsplit.profiles import ModelProfile
from fedsplit.wireless import Channel, ChannelSpec

PlanRound = Callable[[int], RoundPlan]


@dataclass(frozen=True, eq=False)
class Scenario:
    """A system and a scheme on it.

    Parameters
    ----------
    plan_round : callable
        The scheme's plan for a round, counted from 1.
    profile, fleet, channel
        The model, the machines, the radio.
    batch_size : int
        Samples per mini-batch.
    codec_ratio : callable
        Expected compression of codec settings.
    """

    plan_round: PlanRound
    profile: ModelProfile
    fleet: Fleet
    channel: Channel
    batch_size: int
    codec_ratio: CodecRatio

    def timeline(self, server_round: int) -> Timeline:
        """Return the timeline of a round."""
        return self._timeline(self.plan_round(server_round), server_round)

    def row(self, server_round: int) -> RoundRow:
        """Return what a round costs."""
        plan = self.plan_round(server_round)
        cost = self._timeline(plan, server_round).cost
        devices, servers = self.fleet.devices, self.fleet.servers
        return RoundRow(
            round=server_round,
            branches=len(plan.branches),
            delay_s=cost.delay_s,
            waiting_s=cost.waiting_s,
            device_energy_j=float(cost.device_energy_j.sum()),
            server_energy_j=float(cost.server_energy_j.sum()),
            uplink_bytes=float(cost.uplink_bytes.sum()),
            downlink_bytes=float(cost.downlink_bytes.sum()),
            backhaul_bytes=float(cost.backhaul_bytes.sum()),
            device_peak_bytes=float(cost.device_memory_bytes.max()),
            server_peak_bytes=float(cost.server_memory_bytes.max()),
            devices_over_memory=int((cost.device_memory_bytes > devices.memory_bytes).sum()),
            servers_over_memory=int((cost.server_memory_bytes > servers.memory_bytes).sum()),
        )

    def _timeline(self, plan: RoundPlan, server_round: int) -> Timeline:
        steps = max(turn.steps for branch in plan.branches for turn in branch.turns)
        states = self.channel.realise_steps(server_round, steps)
        return timeline(plan, self.profile, self.fleet, states, self.batch_size, self.codec_ratio)


def build_scenario(config: DictConfig) -> Scenario:
    """Return the scenario that the configuration describes.

    Raises
    ------
    FedsplitError
        If a part of the configuration is wrong; names the group, the field and what is allowed.
    """
    channel_spec = from_mapping(ChannelSpec, plain(config.channel), "channel")
    fleet_spec = from_mapping(FleetSpec, plain(config.fleet), "fleet")
    fleet = build_fleet(fleet_spec, config.seed)
    channel = Channel(channel_spec, fleet.devices.positions_m, fleet.stations_m, config.seed)
    model = json.dumps(to_mapping(model_spec(config)), sort_keys=True)
    profile = _profile(model, config.data.get("seq_len", 1))
    strategy, work, codec = build_strategy(config), local_work(config), codec_plan(config)
    samples = dict(enumerate(fleet.samples.tolist()))

    def plan_round(server_round: int) -> RoundPlan:
        return strategy.plan_round(
            Scene(server_round, profile.n_blocks, samples, work, codec, config.seed)
        )

    return Scenario(plan_round, profile, fleet, channel, work.batch_size, gaussian_ratio(profile))


@cache
def _profile(model: str, seq_len: int) -> ModelProfile:
    """Profile a model once, however many scenarios sweep over something else."""
    return profile_model(from_mapping(ModelSpec, json.loads(model), "model"), seq_len)


def gaussian_ratio(profile: ModelProfile, seed: int = 0) -> CodecRatio:
    """Return the compression that codecs reach on Gaussian boundaries of the model's shape.

    An estimate for plans: the bytes of a run depend on its data. Codecs that learn from earlier
    batches are estimated at their first one.
    """
    width = max(int(profile.embed.boundary_bytes / 4 / profile.seq_len), 1)
    sample = torch.randn((4, profile.seq_len, width), generator=torch.Generator().manual_seed(seed))

    def ratio(settings: Mapping[str, object]) -> float:
        payload = make_codec(settings, seed).encode(sample, samples=tuple(range(4)))
        return len(payload) / (sample.numel() * sample.element_size())

    return ratio


def expand_sweeps(overrides: Sequence[str], multirun: bool) -> list[tuple[str, ...]]:
    """Return the overrides of each scenario: Hydra's sweeps (``a=1,2``, ``glob(*)``) as a product.

    Raises
    ------
    FedsplitError
        If an override cannot be parsed, or sweeps without `multirun`.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
            choices = []
            for text, override in zip(overrides, parsed, strict=True):
                if override.is_sweep_override():
                    if not multirun:
                        raise FedsplitError(f"{text!r}: several values need --multirun (-m)")
                    key = override.get_key_element()
                    values = override.sweep_string_iterator()
                    choices.append([f"{key}={value}" for value in values])
                else:
                    choices.append([text])
    except HydraException as error:
        raise FedsplitError(f"configuration: {error}") from error
    return list(itertools.product(*choices))


def plan(overrides: Sequence[str], multirun: bool, console: Console) -> int:
    """Plan every scenario, print a comparison, and leave table, plot and timelines in a folder.

    Parameters
    ----------
    overrides : sequence of str
        Hydra overrides; with `multirun`, sweeps too.
    multirun : bool
        Whether overrides may sweep.
    console : Console
        Where the table goes.

    Returns
    -------
    int
        Exit code, 0.
    """
    expanded = expand_sweeps(overrides, multirun)
    results: dict[str, list[RoundRow]] = {}
    first: Timeline | None = None
    output: str | None = None
    for chosen in expanded:
        swept = [text for i, text in enumerate(chosen) if len({e[i] for e in expanded}) > 1]
        name = " ".join(map(_short_name, swept or chosen)) or "default"
        config = load_config(chosen)
        output = output or config.output
        with _named_files(chosen):
            scenario = build_scenario(config)
            results[name] = [scenario.row(r) for r in range(1, config.rounds + 1)]
            first = first or scenario.timeline(1)
    folder = Path(output or f"outputs/plan_{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    folder.mkdir(parents=True, exist_ok=True)
    write_results(results, folder)
    if first is not None and len(results) == 1:
        write_json(first, folder / "timeline.json")
        write_chrome_trace(first, folder / "trace.json", detail=True)
        write_gantt(first, folder / "gantt.png")
    console.print(comparison_table(results))
    console.print(f"[bold]{folder}[/bold]", highlight=False)
    return 0


def _short_name(override: str) -> str:
    """Return ``bandwidth_hz=5e+06`` for ``channel.bandwidth_hz=5000000.0``."""
    key, _, value = override.partition("=")
    with suppress(ValueError):
        value = f"{float(value):g}"
    return f"{key.rpartition('.')[2]}={value}"


@contextmanager
def _named_files(overrides: Sequence[str]) -> Iterator[None]:
    """Name the file that a wrong setting of the channel or fleet comes from."""
    try:
        yield
    except FedsplitError as error:
        wrong = re.match(r"(channel|fleet)[.:]", str(error))
        if wrong is None:
            raise
        group = wrong[1]
        defaults = OmegaConf.load(config_dir() / "config.yaml").defaults
        choice = next((item[group] for item in defaults if group in item), "")
        for text in overrides:
            key, _, value = text.partition("=")
            choice = value if key == group else choice
        file = config_dir() / group / f"{choice}.yaml"
        raise FedsplitError(f"{file} or an override: {error}") from error
