"""What a strategy decides for a round: routes, turns, branches.

These words carry no tensors and no I/O; models, execution, planning, fleet and flower all speak
them. See docs/architecture.md for the vocabulary.
"""

import enum
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from fedsplit.errors import FedsplitError, require

DEVICE, EDGE, CLOUD, SERVER = "device", "edge", "cloud", "server"
TIERS = (DEVICE, EDGE, CLOUD, SERVER)
_SEGMENT = re.compile(r"\s*(\w+)\s*\[\s*(\d+)\s*:\s*(\d+)\s*\]\s*")


@dataclass(frozen=True)
class Segment:
    """The blocks ``[start, stop)`` of a model on one tier.

    The first segment of a route also holds the embeddings, the last one the final norm, the head
    and the loss.
    """

    tier: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.tier}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Route:
    """The ordered segments of a forward pass through a model of `n_blocks` blocks.

    Raises
    ------
    FedsplitError
        If the segments do not cover the blocks in order, name an unknown tier, do not start at
        the device, or visit a server tier twice.
    """

    n_blocks: int
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        # The text of a route is made for messages only: plans have thousands.
        self._check(len(self.segments) > 0, "at least one segment")
        expected = 0
        for segment in self.segments:
            if segment.tier not in TIERS:
                require(False, "route tier", segment.tier, f"one of {', '.join(TIERS)}")
            if segment.start != expected or segment.stop < segment.start:
                raise FedsplitError(
                    f"route={self}: segments must cover blocks 0..{self.n_blocks} in order, "
                    f"but {segment} does not start at block {expected}"
                )
            expected = segment.stop
        if expected != self.n_blocks:
            self._check(False, f"segments that end at block {self.n_blocks}")
        tiers = [segment.tier for segment in self.segments]
        self._check(tiers[0] == DEVICE, "a route that starts at the device")
        inner = tiers[1:-1] if self.returns_home else tiers[1:]
        self._check(
            len(set(inner)) == len(inner) and DEVICE not in inner,
            "a route that visits each server once and returns to the device at most at its end",
        )

    def _check(self, condition: bool, allowed: str) -> None:
        if not condition:
            require(condition, "route", str(self), allowed)

    def __str__(self) -> str:
        return " -> ".join(str(segment) for segment in self.segments)

    @property
    def returns_home(self) -> bool:
        """Whether the route ends where it began (U shape), so that labels stay on the device."""
        return len(self.segments) > 1 and self.segments[-1].tier == DEVICE

    @property
    def cuts(self) -> tuple[int, ...]:
        """Block counts at which the route crosses from one segment to the next."""
        return tuple(segment.stop for segment in self.segments[:-1])

    def on(self, tier: str) -> tuple[Segment, ...]:
        """Return the segments that live on `tier`, in order."""
        return tuple(segment for segment in self.segments if segment.tier == tier)

    @classmethod
    def parse(cls, text: str, n_blocks: int) -> "Route":
        """Read a route as `str` writes it: ``device[0:2] -> edge[2:6] -> cloud[6:12]``."""
        segments = []
        for part in text.split("->"):
            match = _SEGMENT.fullmatch(part)
            if match is None:
                raise FedsplitError(
                    f"route={text!r}: {part.strip()!r} is not of the form tier[start:stop]"
                )
            segments.append(Segment(match[1], int(match[2]), int(match[3])))
        return cls(n_blocks, tuple(segments))

    @classmethod
    def device_only(cls, n_blocks: int) -> "Route":
        """Return the route of a device that holds the whole model (FedLoRA)."""
        return cls(n_blocks, (Segment(DEVICE, 0, n_blocks),))

    @classmethod
    def through(cls, n_blocks: int, cuts: Sequence[int], tiers: Sequence[str]) -> "Route":
        """Return the route over `tiers` that changes tier after each of `cuts` blocks."""
        require(len(cuts) == len(tiers) - 1, "cuts", tuple(cuts), f"{len(tiers) - 1} cuts")
        edges = [0, *cuts, n_blocks]
        return cls(
            n_blocks,
            tuple(
                Segment(tier, start, stop)
                for tier, start, stop in zip(tiers, edges[:-1], edges[1:], strict=True)
            ),
        )

    @classmethod
    def two_tier(cls, n_blocks: int, cut: int) -> "Route":
        """Return device[0:cut] -> server[cut:n_blocks]."""
        return cls.through(n_blocks, (cut,), (DEVICE, SERVER))

    @classmethod
    def at_cut(cls, n_blocks: int, cut: int) -> "Route":
        """Return the two-tier route, or the one without a server if the device has all blocks."""
        return cls.device_only(n_blocks) if cut == n_blocks else cls.two_tier(n_blocks, cut)

    @classmethod
    def three_tier(cls, n_blocks: int, device_cut: int, edge_cut: int) -> "Route":
        """Return device[0:device_cut] -> edge[device_cut:edge_cut] -> cloud[edge_cut:n_blocks]."""
        return cls.through(n_blocks, (device_cut, edge_cut), (DEVICE, EDGE, CLOUD))

    @classmethod
    def u_shaped(cls, n_blocks: int, first_cut: int, last_cut: int) -> "Route":
        """Return device[0:first_cut] -> server[first_cut:last_cut] -> device[last_cut:n_blocks]."""
        return cls.through(n_blocks, (first_cut, last_cut), (DEVICE, SERVER, DEVICE))

    @classmethod
    def split(cls, n_blocks: int, cut: int, tail: int | None = None) -> "Route":
        """Return the two-tier route, or the U-shaped one if the device also keeps a tail.

        Parameters
        ----------
        n_blocks : int
            Blocks of the model.
        cut : int
            Blocks on the device before the server.
        tail : int or None
            Blocks on the device behind the server, beside the head and the loss; None leaves
            these on the server.

        Raises
        ------
        FedsplitError
            If the device would hold more blocks than the model has.
        """
        require(0 <= cut <= n_blocks, "cut", cut, f"between 0 and {n_blocks}")
        if tail is None:
            return cls.two_tier(n_blocks, cut)
        require(0 <= tail <= n_blocks - cut, "tail", tail, f"between 0 and {n_blocks - cut}")
        return cls.u_shaped(n_blocks, cut, n_blocks - tail)


class AdapterWay(enum.StrEnum):
    """How the adapters that a device trains reach it and come back."""

    MESSAGE = "message"
    """In Flower's messages, both ways."""
    LINK = "link"
    """Over its link from the first server of its route, and back to that once trained."""
    EDGE = "edge"
    """Over its link, from an edge that keeps and averages them from wave to wave."""


@dataclass(frozen=True)
class CodecPlan:
    """Codec settings of a turn, as the mappings that `fedsplit.codec.make_codec` reads."""

    uplink: dict[str, object] = field(default_factory=lambda: {"name": "identity"})
    downlink: dict[str, object] = field(default_factory=lambda: {"name": "identity"})

    @property
    def over_turns(self) -> bool:
        """Whether a codec goes on in a device's next turn with what it remembers."""
        return any(bool(way.get("over_turns")) for way in (self.uplink, self.downlink))


@dataclass(frozen=True)
class Failure:
    """A node that dropped out: in which phase of a round ("train", "evaluate"), why, and when.

    `role` is "device" (which loses its turn) or "edge"; `index` says which one. `unix_s` is when
    the server gave it up, in seconds since 1970.
    """

    role: str
    index: int
    phase: str
    reason: str
    unix_s: float | None = None

    @property
    def who(self) -> str:
        """Role and index: "device 3"."""
        return f"{self.role} {self.index}"


@dataclass(frozen=True)
class Turn:
    """One device's share of a round: where its model is cut and what it is given.

    Parameters
    ----------
    device : int
        Index of the device in the fleet.
    route : Route
        Where each block runs during this turn.
    steps : int
        Mini-batches trained in this turn.
    codec : CodecPlan
        How boundaries (uplink) and their gradients (downlink) are compressed.
    edge : int or None
        Index of the edge server on a route with an edge tier.
    uplink_hz, downlink_hz : float or None
        Bandwidth share; None means an equal share of the channel.
    server_hz : float or None
        Server clock during this turn; None means its maximum.
    device_hz, uplink_w : float or None
        The device's clock and transmit power during this turn; None means their maximum.
    repeat : int
        How many turns the device had in this round before; its random draws depend on it.
    rank : int or None
        Components of the adapters that it trains, on every tier; None: all of them.
    frozen : bool
        Whether the device's blocks only infer: the boundary of a sample crosses its cut once.
    fresh : float
        With `frozen`, the share of its samples that is expected to be new to the server.
    residual : int
        Components beside the adapters that it is given, trained by nobody; found by
        `fedsplit.schemes.check`, whatever a scheme says.
    """

    device: int
    route: Route
    steps: int
    codec: CodecPlan = field(default_factory=CodecPlan)
    edge: int | None = None
    uplink_hz: float | None = None
    downlink_hz: float | None = None
    server_hz: float | None = None
    device_hz: float | None = None
    uplink_w: float | None = None
    repeat: int = 0
    rank: int | None = None
    frozen: bool = False
    fresh: float = 1.0
    residual: int = 0


@dataclass(frozen=True)
class Branch:
    """One complete set of adapters, trained by waves of turns, one wave after the other.

    The turns of a wave train side by side from the same adapters. What they trained is averaged,
    weighted by their devices' training samples, before the next wave: at their edge server the
    adapters of devices and edge, at the server the rest.

    Parameters
    ----------
    turns : tuple of Turn
        Wave by wave.
    width : int
        Turns in a wave (the last one may have fewer). With 1, turns follow each other.

    Raises
    ------
    FedsplitError
        If a wave names a device twice, a device has two turns of the same `Turn.repeat`, or turns
        that an edge averages differ in their edge or in what lies behind it.
    """

    turns: tuple[Turn, ...]
    width: int = 1

    def __post_init__(self) -> None:
        require(self.width >= 1, "branch width", self.width, "at least 1")
        if len(self.turns) < 2:
            return
        for wave in self.waves if self.width > 1 else ():
            devices = tuple(turn.device for turn in wave)
            require(len(set(devices)) == len(devices), "wave devices", devices, "each device once")
        numbers = [(turn.device, turn.repeat) for turn in self.turns]
        unique = len(set(numbers)) == len(numbers)
        require(unique, "turns (device, repeat)", numbers, "different from each other")
        if self.way is AdapterWay.EDGE:
            routes = tuple(str(turn.route) for turn in self.turns)
            over_edge = all(turn.route.on(EDGE) for turn in self.turns)
            require(over_edge, "branch routes", routes, "over an edge, if one of them is")
            edges = {turn.edge for turn in self.turns}
            require(len(edges) == 1, "branch edges", edges, "one edge that averages its turns")
            behind = {
                tuple(s for s in turn.route.segments if s.tier not in (DEVICE, EDGE))
                for turn in self.turns
            }
            require(len(behind) == 1, "branch routes", behind, "one segment behind the edge")

    @property
    def waves(self) -> tuple[tuple[Turn, ...], ...]:
        """The turns, wave by wave."""
        starts = range(0, len(self.turns), self.width)
        return tuple(self.turns[start : start + self.width] for start in starts)

    @property
    def way(self) -> AdapterWay:
        """How adapters reach the devices: over links where turns train side by side.

        They stay at an edge from wave to wave where several devices, or one several times, train
        behind it.
        """
        together = self.width > 1 or any(turn.repeat for turn in self.turns)
        if len(self.turns) > 1 and together and any(turn.route.on(EDGE) for turn in self.turns):
            return AdapterWay.EDGE
        return AdapterWay.LINK if self.width > 1 else AdapterWay.MESSAGE

    @property
    def rank(self) -> int | None:
        """Components of the adapters that any of its turns trains; None: all of them."""
        ranks = [turn.rank for turn in self.turns]
        return None if None in ranks else max(rank for rank in ranks if rank is not None)

    @property
    def devices(self) -> tuple[int, ...]:
        """Devices that take part, each named once."""
        return tuple(dict.fromkeys(turn.device for turn in self.turns))


@dataclass(frozen=True)
class RoundPlan:
    """The branches of a round; they run in parallel and are averaged at its end."""

    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        require(len(self.branches) > 0, "plan", self.branches, "at least one branch")
        require(
            all(branch.turns for branch in self.branches),
            "plan",
            self.branches,
            "branches of at least one turn",
        )
        devices = self.devices
        once = len(set(devices)) == len(devices)
        require(once, "plan devices", devices, "each device in one branch")

    @classmethod
    def parallel(cls, turns: Iterable[Turn]) -> "RoundPlan":
        """Return one branch for every turn (SFT, FedsLLM, SplitFed, FedLoRA)."""
        return cls(tuple(Branch((turn,)) for turn in turns))

    @classmethod
    def sequential(cls, turns: Iterable[Turn]) -> "RoundPlan":
        """Return a single branch of all turns in order (vanilla split learning, CARD, Fast)."""
        return cls((Branch(tuple(turns)),))

    @classmethod
    def grouped(cls, groups: Iterable[Iterable[Turn]]) -> "RoundPlan":
        """Return one branch for each group of turns (GSFL)."""
        return cls(tuple(Branch(tuple(turns)) for turns in groups))

    @classmethod
    def hierarchical(cls, groups: Iterable[Iterable[Turn]], rounds: int) -> "RoundPlan":
        """Return one branch for each group, whose turns train side by side `rounds` times."""
        require(rounds >= 1, "rounds", rounds, "at least 1")

        def times(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
            return tuple(replace(turn, repeat=r) for r in range(rounds) for turn in turns)

        once = [tuple(turns) for turns in groups]
        return cls(tuple(Branch(times(turns), max(len(turns), 1)) for turns in once))

    @property
    def devices(self) -> tuple[int, ...]:
        """Devices that take part, by branch."""
        return tuple(device for branch in self.branches for device in branch.devices)
