"""The modelled system that a configuration describes: model costs, machines, radio."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from omegaconf import DictConfig

from fedsplit.codec import make_codec
from fedsplit.fleet import (
    CodecRatio,
    Fleet,
    FleetSpec,
    SentBytes,
    Timeline,
    build_fleet,
    timeline,
)
from fedsplit.flower import LocalWork, Scene, SplitStrategy
from fedsplit.mapping import from_mapping, to_mapping
from fedsplit.models import ModelSpec, check_route, possible_cuts
from fedsplit.models.profile import profile_model
from fedsplit.plan import CodecPlan, RoundPlan
from fedsplit.profiles import ModelProfile
from fedsplit.wireless import Channel, ChannelSpec

from .config import codec_plan, local_work, model_spec, plain


@dataclass(frozen=True, eq=False)
class System:
    """What a run is planned for and costed on; nothing of it is measured.

    Parameters
    ----------
    profile, fleet, channel
        The model, the machines, the radio.
    work, codec
        What a turn trains and how boundaries are compressed.
    codec_ratio : callable
        Expected compression of codec settings.
    seed : int
        Root of all draws.
    possible_cuts : callable
        ``possible_cuts()``: the cuts of two-tier routes that the model allows.
    """

    profile: ModelProfile
    fleet: Fleet
    channel: Channel
    work: LocalWork
    codec: CodecPlan
    codec_ratio: CodecRatio
    seed: int
    possible_cuts: Callable[[], Sequence[int]]

    def scene(self, server_round: int, samples: Mapping[int, int]) -> Scene:
        """Return the situation of a round for the devices in `samples`."""
        return Scene(
            server_round,
            samples,
            self.work,
            self.profile,
            self.fleet,
            self.channel.realise(server_round),
            self.channel.mean,
            self.codec,
            self.seed,
            self.codec_ratio,
            self.possible_cuts,
        )

    def timeline(
        self, plan: RoundPlan, server_round: int, sent: SentBytes | None = None
    ) -> Timeline:
        """Return when everything in a round happens, with the bytes really `sent` if known."""
        steps = max(turn.steps for branch in plan.branches for turn in branch.turns)
        states = self.channel.realise_steps(server_round, steps)
        return timeline(
            plan, self.profile, self.fleet, states, self.work.batch_size, self.codec_ratio, sent
        )


def build_system(config: DictConfig) -> System:
    """Return the system that the configuration describes.

    Raises
    ------
    FedsplitError
        If a part of the configuration is wrong; names the group, the field and what is allowed.
    """
    channel_spec = from_mapping(ChannelSpec, plain(config.channel), "channel")
    fleet = build_fleet(from_mapping(FleetSpec, plain(config.fleet), "fleet"), config.seed)
    positions = fleet.devices.positions_m
    channel = Channel(channel_spec, positions, fleet.stations_m, config.seed, fleet.home)
    spec = model_spec(config)
    # What a model costs does not depend on its weights.
    model = json.dumps(to_mapping(replace(spec, seed=0)), sort_keys=True)
    profile = _profile(model, config.data.get("seq_len", 1))
    return System(
        profile,
        fleet,
        channel,
        local_work(config),
        codec_plan(config),
        gaussian_ratio(profile),
        config.seed,
        cache(partial(possible_cuts, spec)),
    )


def refuse_impossible(strategy: SplitStrategy, system: System, spec: ModelSpec) -> None:
    """Refuse a scheme whose first round has a route on which the model cannot be trained.

    Raises
    ------
    FedsplitError
        Naming the route and the cuts that are possible.
    """
    scene = system.scene(1, dict.fromkeys(range(system.fleet.n_devices), 1))
    for route in {turn.route for turn in strategy.plan_evaluation(scene)}:
        check_route(spec, route)


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

    @cache
    def measured(text: str) -> float:
        payload = make_codec(json.loads(text), seed).encode(sample, samples=tuple(range(4)))
        return len(payload) / (sample.numel() * sample.element_size())

    def ratio(settings: Mapping[str, object]) -> float:
        return measured(json.dumps(dict(settings), sort_keys=True))

    return ratio
