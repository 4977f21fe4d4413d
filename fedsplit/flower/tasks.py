"""What nodes are told: the job that all share, and the task of a device or an edge."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fedsplit.data import DataSpec
from fedsplit.errors import NodeLost, require, require_choice
from fedsplit.execution import OptimizerSpec
from fedsplit.flower.link_settings import PLAIN, SECURITIES
from fedsplit.mapping import to_mapping
from fedsplit.models import ModelSpec
from fedsplit.patience import Patience
from fedsplit.plan import AdapterWay, Turn
from fedsplit.privacy import PrivacySpec
from fedsplit.transport import ServerLimits, TurnBounds


@dataclass(frozen=True, kw_only=True)
class Job:
    """What stays the same for all turns of a run and every node has to know.

    Parameters
    ----------
    model : ModelSpec
        The model to fine-tune.
    n_devices : int
        Devices that take part, and that a data set named here is split over.
    data : DataSpec or None
        The data that the devices hold; None where each device has a loader of its own.
    data_paths : tuple of str or None
        In a simulation with data of each device's own (``data.partition=local``), their files or
        folders; a node that was started with a ``data-path`` of its own does not need it.
    optimizer : OptimizerSpec
        The optimizer of every segment; it starts fresh at each turn.
    batch_size : int
        Samples per mini-batch, in training and evaluation.
    seed : int
        Root of every random draw.
    threads : int
        Torch threads of a device process; fixed, because sums depend on it.
    accelerator : str
        ``auto`` (a GPU when there is one), ``cpu`` or a torch device name.
    source : str
        Hash of the server's fedsplit source, which devices must run too; `SplitStrategy` fills it
        in.
    security : str
        What the run's link is: "plain", "tls", or "mutual" (nodes show certificates too).
    patience : Patience
        How long who waits for whom.
    limits : ServerLimits
        What servers take from their peers; its time limits are those of `patience`.
    privacy : PrivacySpec
        How devices defend what they send.
    max_tokens : int
        Tokens of a sample at most, where devices have loaders of their own.
    max_eval_samples : int or None
        Test samples of a device at most, drawn once for the run; None: all.
    token_accuracy : bool
        Whether an evaluation of a language model counts the tokens predicted right.

    Raises
    ------
    SettingsError
        If a value is out of range.
    """

    model: ModelSpec
    n_devices: int
    data: DataSpec | None = None
    data_paths: tuple[str, ...] | None = None
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    batch_size: int = 8
    seed: int = 0
    threads: int = 1
    accelerator: str = "auto"
    source: str = ""
    security: str = PLAIN
    patience: Patience = field(default_factory=Patience)
    limits: ServerLimits = field(default_factory=ServerLimits)
    privacy: PrivacySpec = field(default_factory=PrivacySpec)
    max_tokens: int = 2048
    max_eval_samples: int | None = None
    token_accuracy: bool = False

    def __post_init__(self) -> None:
        require_choice("security", self.security, SECURITIES)
        for name in ("n_devices", "batch_size", "threads", "max_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        most = self.max_eval_samples
        require(most is None or most >= 1, "max_eval_samples", most, "at least 1, or null for all")
        in_force = replace(
            self.limits,
            backward_timeout_s=self.patience.backward_s,
            supply_timeout_s=self.patience.reply_s,
        )
        object.__setattr__(self, "limits", in_force)

    @cached_property
    def text(self) -> str:
        """The job as JSON: written once, however many nodes are told."""
        return json.dumps(to_mapping(self))

    @cached_property
    def model_text(self) -> str:
        """The model's settings as JSON."""
        return json.dumps(to_mapping(self.model), sort_keys=True)

    @cached_property
    def data_text(self) -> str:
        """All that samples depend on, as JSON, beside the device and what its node is told."""
        data = None if self.data is None else to_mapping(self.data)
        fields = (data, to_mapping(self.model), self.n_devices, self.seed, self.data_paths)
        return json.dumps(fields, sort_keys=True)

    def bounds(self, steps: int) -> TurnBounds:
        """Return how much a turn of so many mini-batches may ask of a server."""
        tokens = self.max_tokens if self.data is None else self.data.seq_len
        images = self.data is not None and self.model.task == "image-classification"
        pixels = self.data.image_size if self.data is not None and images else None
        return TurnBounds(samples=self.batch_size, tokens=tokens, steps=steps, pixels=pixels)


@dataclass(frozen=True)
class Contact:
    """Where a node calls, and the token that lets it in."""

    address: str
    token: str


@dataclass(frozen=True, kw_only=True)
class TurnTask:
    """What a device is told to do in one turn.

    Parameters
    ----------
    job : Job
        The run's.
    presence : Contact or None
        Where the device shows its presence; None if the grid sees by itself who works on what.
    server_round : int
        The round.
    turn : Turn
        Its share of the round.
    seed : int
        The turn's, the same on every tier.
    way : AdapterWay
        How adapters reach it and come back.
    door : Contact or None
        The link to the first server of its route; None on a route that never leaves the device.
    ahead : bool
        Whether it is to get ready first; it is told the door over its presence when it may begin.
    """

    job: Job
    presence: Contact | None
    server_round: int
    turn: Turn
    seed: int
    way: AdapterWay
    door: Contact | None
    ahead: bool = False

    def __post_init__(self) -> None:
        told = self.presence is not None or not self.ahead
        require(told, "ahead", self.ahead, "false without presence")


@dataclass(frozen=True, kw_only=True)
class EdgeTurn:
    """One turn that an edge is to serve.

    Who may enter it, where it goes on, what trains it, its mini-batches (in evaluation, at most),
    and its weight.
    """

    token: str
    turn: Turn
    steps: int
    seed: int
    onward: Contact | None
    optimizer: OptimizerSpec | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class EdgeBranch:
    """Turns that an edge is to serve together.

    Either a single one, or the waves of a branch, `width` turns each, whose adapters stay
    (`AdapterWay.EDGE`): devices then fetch theirs here, and the edge averages what comes of a wave
    once it is told which of its turns count.
    """

    turns: tuple[EdgeTurn, ...]
    width: int = 1
    stays: bool = False

    @property
    def n_waves(self) -> int:
        """How many waves there are."""
        return -(-len(self.turns) // self.width)

    def wave(self, number: int) -> range:
        """Return the places of a wave's turns."""
        start = number * self.width
        return range(start, min(start + self.width, len(self.turns)))


@dataclass(frozen=True, kw_only=True)
class EdgeTask:
    """What an edge is told: the branches to serve.

    The cloud says so if it gives up a turn; without a word the edge waits for the job's patience.
    """

    job: Job
    presence: Contact
    branches: tuple[EdgeBranch, ...]
    train: bool


@dataclass(frozen=True)
class Verdict:
    """Which turns of a wave count; the cloud says so when they are over.

    Of a turn that does not stay at the edge, it says so only if it gave it up.
    """

    branch: int
    wave: int
    counted: tuple[int, ...]

    @classmethod
    def read(cls, words: Mapping[str, Any]) -> "Verdict":
        """Return the verdict that the cloud sent as `words`.

        Raises
        ------
        NodeLost
            If it is none.
        """
        counted = words.get("counted")
        numbers = [words.get("branch"), words.get("wave")]
        numbers += counted if isinstance(counted, list) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise NodeLost(f"words={dict(words)!r}: must be a branch, a wave and turns that count")
        return cls(words["branch"], words["wave"], tuple(words["counted"]))
