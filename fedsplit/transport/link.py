"""The link: what a segment calls to reach the next one, and what it reaches there."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fedsplit.codec import Remembered
from fedsplit.errors import FedsplitError, require
from fedsplit.models import Arrival, Boundary, Crossing
from fedsplit.plan import CodecPlan, Route
from fedsplit.transport.frames import TOKEN_BYTES
from fedsplit.transport.held import Held
from fedsplit.transport.tensors import TensorCoder

Gradients = tuple[Tensor | None, ...]


class LinkError(FedsplitError):
    """The other end of a link refused, failed or is gone; this turn is lost, no other."""


def new_token() -> str:
    """Return a fresh random token for one turn, as 32 hexadecimal digits."""
    return secrets.token_hex(TOKEN_BYTES)


@dataclass(frozen=True, kw_only=True)
class TurnBounds:
    """How much a turn may ask of a server, from the server's own settings.

    Parameters
    ----------
    samples, tokens : int
        Of a mini-batch at most, and of each of its samples.
    pixels : int or None
        Height and width of images; None for texts, and where the model's configuration says it.
    steps : int or None
        Mini-batches: exactly so many where the turn trains, at least one and at most so many where
        it evaluates; None for any number.

    Raises
    ------
    FedsplitError
        If one is below its least: 1 sample, 1 token, 0 steps.
    """

    samples: int = 64
    tokens: int = 2048
    steps: int | None = None
    pixels: int | None = None

    def __post_init__(self) -> None:
        require(self.samples >= 1, "samples", self.samples, "at least 1")
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1")
        require(self.steps is None or self.steps >= 0, "steps", self.steps, "at least 0, or None")


@dataclass(frozen=True)
class OpenRequest:
    """What both ends of a link must agree on before a turn.

    Parameters
    ----------
    token : str
        The turn's secret from `new_token`: it lets its bearer into this turn and no other. Every
        link of a route has a token of its own.
    route : Route
        Where each block runs during this turn.
    position : int
        Index in ``route.segments`` of the segment that the link leads to.
    codec : CodecPlan
        How boundaries and gradients are compressed.
    seed : int
        Seed of the turn, the same on every tier; dropout and codecs draw from it.
    train : bool
        Whether the turn trains (dropout on, gradients) or evaluates.
    adapters_on_link : bool
        Whether the device fetches its adapters over this link, and hands up what it trained.
    bounds : TurnBounds
        What the answering end allows; it does not travel, and each end may have its own.
    held : Held or None
        At the answering end, what it has of a device whose blocks only infer; it does not travel.
    remembered : Remembered or None
        What codecs at this end remember of the device's earlier turns; it does not travel.
    """

    token: str
    route: Route
    position: int
    codec: CodecPlan = field(default_factory=CodecPlan)
    seed: int = 0
    train: bool = True
    adapters_on_link: bool = False
    bounds: TurnBounds = field(default_factory=TurnBounds)
    held: Held | None = None
    remembered: Remembered | None = None

    def coder(self) -> TensorCoder:
        """Return this end's codecs for the turn."""
        of = f"{self.route} {self.codec}"
        return TensorCoder(self.codec, self.seed, self.remembered, of)

    @property
    def handed_up(self) -> bool:
        """Whether the device hands up over this link what it trained."""
        return self.adapters_on_link and self.train and self.held is None

    def __post_init__(self) -> None:
        digits = 2 * TOKEN_BYTES
        try:
            valid = len(self.token) == digits and len(bytes.fromhex(self.token)) == TOKEN_BYTES
        except ValueError:
            valid = False
        if not valid:  # the message must not show a secret
            raise FedsplitError(f"token: must be {digits} hexadecimal digits")
        last = len(self.route.segments) - 1
        require(1 <= self.position <= last, "position", self.position, f"1..{last}")

    def agreed(self) -> dict[str, object]:
        """Return what the two ends compare when the link opens, as plain values."""
        return {
            "route": str(self.route),
            "position": self.position,
            "codec": {"uplink": dict(self.codec.uplink), "downlink": dict(self.codec.downlink)},
            "seed": self.seed,
            "train": self.train,
            "adapters_on_link": self.adapters_on_link,
        }


@dataclass(frozen=True)
class StepReply:
    """What comes back from the rest of an open route: boundary gradients and the loss.

    `loss` is the mean over `n_targets`; for `norm` see `BackwardReply`.
    """

    gradients: Gradients
    loss: float
    n_targets: int
    norm: float | None = None


@dataclass(frozen=True)
class BackwardReply:
    """What comes back of a U-shaped route's second half: gradients of the boundary sent first.

    `norm` is that of the gradients of all parameters from there on, with the last mini-batch of a
    step whose gradients are clipped.
    """

    gradients: Gradients
    norm: float | None = None


@dataclass(frozen=True)
class EvalReply:
    """Loss of a mini-batch, mean over `n_targets`; `n_correct` where the model classifies.

    Of each class of texts, `classes` has three numbers: how many were taken for it rightly, how
    many were taken for it, and how many are of it.
    """

    loss: float
    n_targets: int
    n_correct: int | None
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class LinkStats:
    """Bytes that a link carried: up (away from the device) and down.

    `payload` bytes stand for boundary tensors and gradients, after their codec; the totals also
    hold frame headers, masks and labels. The frames that exchange adapters are counted apart.
    """

    up_bytes: int = 0
    down_bytes: int = 0
    up_payload_bytes: int = 0
    down_payload_bytes: int = 0
    up_adapter_bytes: int = 0
    down_adapter_bytes: int = 0

    def __add__(self, other: "LinkStats") -> "LinkStats":
        """Return the sum over two links or turns."""
        return LinkStats(
            self.up_bytes + other.up_bytes,
            self.down_bytes + other.down_bytes,
            self.up_payload_bytes + other.up_payload_bytes,
            self.down_payload_bytes + other.down_payload_bytes,
            self.up_adapter_bytes + other.up_adapter_bytes,
            self.down_adapter_bytes + other.down_adapter_bytes,
        )


class Steps(Protocol):
    """What happens at a cut during a turn: the calls of a link, and of the tier it leads to."""

    def step(
        self,
        inputs: Mapping[str, Tensor],
        boundary: Boundary,
        samples: Sequence[int],
        share: float = 1.0,
    ) -> StepReply:
        """Train on a mini-batch on an open route: one trip up, gradients and loss down.

        Parameters
        ----------
        inputs : mapping of str to Tensor
            What later tiers need beside the boundary (``SplitModel.travelling``).
        boundary : Boundary
            Tensors at the cut; the reply has a gradient for each that requires one.
        samples : sequence of int
            Identity of each sample of the mini-batch, for codecs with memory.
        share : float
            Its part of the targets of the mini-batches that one update is made of.
        """
        ...

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        boundary: Boundary,
        samples: Sequence[int],
        share: float = 1.0,
    ) -> Boundary:
        """Send a boundary up and return the next one (U shape); `backward` follows in training."""
        ...

    def backward(self, gradients: Gradients) -> BackwardReply:
        """Send the gradients of `forward`'s result up and return those of its argument."""
        ...

    def update(self, norm: float) -> None:
        """Say, where gradients are clipped, the norm of a step's gradients over all tiers.

        It travels with the next message; who is told it has the optimizer make its step.
        """
        ...

    def evaluate(
        self, inputs: Mapping[str, Tensor], boundary: Boundary, samples: Sequence[int]
    ) -> EvalReply:
        """Return the loss of a mini-batch on an open route, without training."""
        ...


class Link(Steps, Protocol):
    """What a segment calls to reach the next one. Calls come one at a time, in order.

    Only steps may begin before the one before them is answered (`begin_step`).

    Every call raises `LinkError` if the other end refuses, fails, is gone or is silent for too
    long; the link is of no further use then.
    """

    def open(self, request: OpenRequest, returning: Crossing | None = None) -> frozenset[int]:
        """Enter the turn that `request` names.

        `returning` is what `forward` gives back, needed on a route that returns home. Returned are
        the samples that the other end holds, of a device whose blocks only infer: their rows are
        left out of what `step` is given, and so are those of samples that were sent since.
        """
        ...

    def begin_step(
        self,
        inputs: Mapping[str, Tensor],
        boundary: Boundary,
        samples: Sequence[int],
        share: float = 1.0,
    ) -> Callable[[], StepReply]:
        """Send what `step` sends; return how to wait for its reply.

        More steps may begin before that; their replies are waited for in the same order.
        """
        ...

    def fetch(self, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the adapters that the device starts from, once the other end knows them.

        They have the names, shapes and types of those `expected`; residuals need not be there, and
        may be of a lower rank.
        """
        ...

    def hand_up(self, adapters: Mapping[str, Tensor]) -> None:
        """Leave the device's trained `adapters` with the other end, after the last step."""
        ...

    def close(self) -> LinkStats:
        """Leave the turn after its last step was applied; return the bytes carried."""
        ...

    def abort(self) -> None:
        """Hang up at once; the turn counts as failed unless it was closed."""
        ...


class Visit(Steps, Protocol):
    """One turn at the tier that a link leads to, while its link is open."""

    request: OpenRequest

    @property
    def arrival(self) -> Arrival:
        """What must come in every mini-batch; known once the turn is entered."""
        ...

    def on_failure(self, call: Callable[[], None]) -> None:
        """Have `call` called once the turn fails, at once if it has; it must not block."""
        ...

    def fetch(self) -> Mapping[str, Tensor]:
        """Return the adapters that the device starts from; waits until they are known."""
        ...

    def hand_up(self, adapters: Mapping[str, Tensor]) -> None:
        """Take some of the device's trained adapters."""
        ...

    def settle(self) -> None:
        """Do what can wait until the reply is on its way: the optimizer's step."""
        ...

    def finish(self) -> None:
        """Leave the turn in good order."""
        ...

    def fail(self, reason: str) -> None:
        """Leave the turn as failed, whatever it is doing; nothing if it was left already.

        Never waits, whatever call is in progress.
        """
        ...


class Host(Protocol):
    """A tier that links lead to (`fedsplit.execution.Stage`)."""

    def enter(self, token: bytes) -> Visit:
        """Return the turn that `token` opens; each token opens its turn once.

        Raises
        ------
        FedsplitError
            If no turn waits for this token.
        """
        ...
