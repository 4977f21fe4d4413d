"""The modelled system that rounds are planned for and costed on: model costs, machines, radio."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np

from fedsplit.codec import gaussian_ratio
from fedsplit.data import Counts
from fedsplit.execution import OptimizerSpec
from fedsplit.fleet import CodecRatio, Fleet, FleetSpec, SentBytes, Timeline, build_fleet
from fedsplit.models import ModelSpec, check_route, possible_cuts
from fedsplit.models.profile import profile_model
from fedsplit.models.routes import ignores_padding
from fedsplit.pace import Pace
from fedsplit.plan import CodecPlan, RoundPlan, Route
from fedsplit.profiles import ModelProfile
from fedsplit.schemes import LocalWork, Scene
from fedsplit.transport import with_messages
from fedsplit.wireless import Channel, ChannelSpec


@dataclass(frozen=True, eq=False, kw_only=True)
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
    try_route : callable
        ``try_route(route)`` raises unless the model can be trained on the route.
    sends_padding : callable
        ``sends_padding()``: whether something in the model depends on it, so that it is sent.
    """

    profile: ModelProfile
    fleet: Fleet
    channel: Channel
    work: LocalWork
    codec: CodecPlan
    codec_ratio: CodecRatio
    seed: int
    possible_cuts: Callable[[], Sequence[int]]
    try_route: Callable[[Route], None]
    sends_padding: Callable[[], bool]

    def with_lengths(self, lengths: Mapping[int, Counts]) -> "System":
        """Return the same system where devices, by index, have samples of these lengths.

        What crosses a cut is as long as they are, unless padding goes along. Planners see all
        devices' mean, the timeline each one's own.
        """
        most = self.profile.seq_len
        parts = {
            device: min(each.tokens / (each.samples * most), 1.0)
            for device, each in lengths.items()
            if each.tokens > 0 and each.samples > 0 and device < self.fleet.n_devices
        }
        if not parts or min(parts.values()) == 1 or self.sends_padding():
            return self
        samples = {device: lengths[device].samples for device in parts}
        mean = sum(samples[n] * part for n, part in parts.items()) / sum(samples.values())
        beside = np.ones(self.fleet.n_devices)
        beside[list(parts)] = np.array(list(parts.values())) / mean
        return replace(
            self,
            profile=self.profile.shortened(mean),
            fleet=replace(self.fleet, length=beside),
        )

    def scene(self, server_round: int, samples: Mapping[int, int]) -> Scene:
        """Return the situation of a round for the devices in `samples`."""
        return Scene(
            server_round=server_round,
            samples=samples,
            work=self.work,
            profile=self.profile,
            fleet=self.fleet,
            channel=self.channel.realise(server_round),
            mean_channel=self.channel.mean,
            codec=self.codec,
            seed=self.seed,
            codec_ratio=self.codec_ratio,
            possible_cuts=self.possible_cuts,
            try_route=self.try_route,
            channel_by_step=partial(self.channel.realise_steps, server_round),
        )

    def timeline(
        self, plan: RoundPlan, server_round: int, sent: SentBytes | None = None
    ) -> Timeline:
        """Return when everything in a round happens, with the bytes really `sent` if known."""
        return self.scene(server_round, {}).timeline(plan, sent)


def make_system(
    model: ModelSpec,
    *,
    fleet: FleetSpec | None = None,
    channel: ChannelSpec | None = None,
    work: LocalWork | None = None,
    optimizer: OptimizerSpec | None = None,
    codec: CodecPlan | None = None,
    seq_len: int = 128,
    seed: int = 0,
    profile: ModelProfile | None = None,
) -> System:
    """Return the system of a model, a fleet and a channel.

    Parameters
    ----------
    model : ModelSpec
        The model; nothing but its configuration is read.
    fleet, channel : FleetSpec, ChannelSpec, optional
        Machines and radio; the default ones if not given.
    work, codec : LocalWork, CodecPlan, optional
        What a turn trains and how boundaries are compressed.
    optimizer : OptimizerSpec, optional
        How it trains: what of that is said on links, and what blocks keep.
    seq_len : int
        Tokens per sample.
    seed : int
        Root of all draws.
    profile : ModelProfile, optional
        What the model costs, if that is known already.

    Raises
    ------
    FedsplitError
        If the model cannot be read, or a setting is wrong.
    """
    machines = build_fleet(fleet or FleetSpec(), seed)
    positions = machines.devices.positions_m
    work = work or LocalWork()
    how, costs = optimizer or OptimizerSpec(), profile or profile_model(model, seq_len)
    profile = with_messages(
        costs.checkpointed() if how.checkpointing else costs,
        work.batch_size,
        clips=how.clip is not None,
        accumulate=how.accumulate,
    )
    profile = replace(profile, pace=Pace(how.accumulate, how.overlap))
    return System(
        profile=profile,
        fleet=machines,
        channel=Channel(
            channel or ChannelSpec(), positions, machines.stations_m, seed, machines.home
        ),
        work=work,
        codec=codec or CodecPlan(),
        codec_ratio=gaussian_ratio(profile, work.batch_size),
        seed=seed,
        possible_cuts=cache(partial(possible_cuts, model)),
        try_route=cache(partial(check_route, model)),
        sends_padding=cache(lambda: not ignores_padding(model, 1, left=False)),
    )
