"""What a scheme sees when it plans a round."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedsplit.arrays import Array
from fedsplit.errors import require
from fedsplit.fleet import CodecRatio, Fleet, SentBytes, Timeline, timeline
from fedsplit.plan import CodecPlan, RoundPlan, Route, Turn
from fedsplit.profiles import ModelProfile
from fedsplit.wireless import ChannelState


@dataclass(frozen=True, kw_only=True)
class LocalWork:
    """How much a device trains in one turn.

    Parameters
    ----------
    batch_size : int
        Samples per mini-batch.
    steps : int or None
        Mini-batches per turn; None means `epochs` passes over the device's data.
    epochs : int
        Passes over the device's data when `steps` is None.
    device_adapters : bool
        Whether devices train the adapters of their blocks, which else only infer.
    ranks : mapping of int to int
        Components of the adapters that a device trains; all of them if it is not named.
    averaged : str
        How adapters become one (`fedsplit.growth`, for what is beside them).
    """

    batch_size: int = 8
    steps: int | None = None
    epochs: int = 1
    device_adapters: bool = True
    ranks: Mapping[int, int] = field(default_factory=dict)
    averaged: str = "mean"

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "train.batch_size", self.batch_size, "at least 1")
        require(
            self.steps is None or self.steps >= 1, "train.steps", self.steps, "null or at least 1"
        )
        require(self.epochs >= 1, "train.epochs", self.epochs, "at least 1")
        for device, rank in self.ranks.items():
            require(rank >= 1, f"model.r_by_device.{device}", rank, "at least 1")

    def steps_for(self, n_samples: int) -> int:
        """Return the mini-batches that a device with `n_samples` trains in a turn.

        An epoch leaves out the samples that do not fill a mini-batch.
        """
        if self.steps is not None:
            return self.steps
        return self.epochs * max(n_samples // self.batch_size, 1)

    def fresh(self, n_samples: int, steps: int, server_round: int) -> float:
        """Return the share of a turn's samples that a device shows for the first time, expected.

        It has had a turn of so many `steps` in every round before, each an epoch or a random part
        of one.
        """
        shown = steps * self.batch_size
        part = min(shown / max(n_samples, 1), 1.0)
        return float((1 - part) ** (server_round - 1) * min(n_samples / max(shown, 1), 1.0))


def _uncompressed(_: Mapping[str, object]) -> float:
    return 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Scene:
    """The situation that a scheme plans a round for.

    Parameters
    ----------
    server_round : int
        The round, from 1.
    samples : mapping of int to int
        Training samples of each device that takes part, in the order that they should be visited.
    work : LocalWork
        How much a device trains in a turn.
    profile : ModelProfile
        What the model costs, block by block.
    fleet : Fleet
        The devices and servers; devices are indices into it.
    channel : ChannelState
        The radio links of all devices of the fleet in this round.
    mean_channel : callable
        ``mean_channel(server_round)``: the links without small-scale fading in any round, for
        what is decided once for several rounds.
    codec : CodecPlan
        The compression that the configuration asks for.
    seed : int
        Root of the scheme's own random draws (`fedsplit.seeds.generator`).
    codec_ratio : callable
        ``codec_ratio(settings)``: encoded over raw bytes that a codec is expected to reach.
    possible_cuts : callable, optional
        ``possible_cuts()``: the cuts of two-tier routes that the model allows; all by default.
    try_route : callable, optional
        ``try_route(route)`` raises unless the model can be trained on the route.
    spent_j : ndarray, optional
        Modelled energy of every device of the fleet in the rounds before this one, for what keeps
        a budget; None where nothing was spent yet.
    residual : int
        Components beside the adapters that the round begins with.
    channel_by_step : callable, optional
        ``channel_by_step(steps)``: the links at each of so many mini-batches of the round, where
        they change within it; `channel` all the time by default.
    """

    server_round: int
    samples: Mapping[int, int]
    work: LocalWork
    profile: ModelProfile
    fleet: Fleet
    channel: ChannelState
    mean_channel: Callable[[int], ChannelState]
    codec: CodecPlan = field(default_factory=CodecPlan)
    seed: int = 0
    codec_ratio: CodecRatio = _uncompressed
    possible_cuts: Callable[[], Sequence[int]] | None = None
    try_route: Callable[[Route], None] | None = None
    spent_j: Array | None = None
    residual: int = 0
    channel_by_step: Callable[[int], Sequence[ChannelState]] | None = None

    @property
    def n_blocks(self) -> int:
        """Blocks of the model."""
        return self.profile.n_blocks

    @property
    def cuts(self) -> tuple[int, ...]:
        """Numbers of blocks that a device can have; with all of them there is no server.

        To be asked by schemes that choose a cut: finding out may take seconds, once for a model.
        """
        ask = self.possible_cuts
        split = range(self.n_blocks) if ask is None else ask()
        return (*split, self.n_blocks)

    @property
    def devices(self) -> tuple[int, ...]:
        """The devices that take part."""
        return tuple(self.samples)

    def turn(self, device: int, route: Route) -> Turn:
        """Return the turn of `device` over `route` with the configured work and codec.

        Use `dataclasses.replace` to give it an edge, a bandwidth share or a server clock.
        """
        steps, rank = self.work.steps_for(self.samples[device]), self.work.ranks.get(device)
        frozen = not self.work.device_adapters
        return Turn(device, route, steps, self.codec, rank=rank, frozen=frozen)

    def laden(self) -> "Scene":
        """Return the same with what is beside the adapters as weights of the model.

        What a scheme plans with.
        """
        if self.residual == 0:
            return self
        return replace(self, profile=self.profile.beside(self.residual), residual=0)

    def on(self, channel: ChannelState) -> "Scene":
        """Return the same situation over the links of `channel`, from the first step to the last.

        What a scheme plans with: it cannot know how links change within the round.
        """
        return replace(self, channel=channel, channel_by_step=None)

    def timeline(self, plan: RoundPlan, sent: SentBytes | None = None) -> Timeline:
        """Return when everything in a round happens, and what it costs.

        Parameters
        ----------
        plan : RoundPlan
            The round.
        sent : mapping, optional
            The bytes really sent, in place of those that a codec is expected to make.

        Raises
        ------
        FedsplitError
            If the plan does not fit the fleet, the model or the bands.
        """
        steps = max(turn.steps for branch in plan.branches for turn in branch.turns)
        states = [self.channel] if self.channel_by_step is None else self.channel_by_step(steps)
        return timeline(
            plan,
            self.profile,
            self.fleet,
            states,
            self.work.batch_size,
            codec_ratio=self.codec_ratio,
            sent=sent,
        )
