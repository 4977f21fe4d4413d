"""What a model costs, unit by unit: plain numbers that planners and the timeline read.

`fedsplit.models.profile` fills these in from a real model; nothing here imports torch.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from fedsplit.errors import FedsplitError, require
from fedsplit.mapping import from_mapping
from fedsplit.pace import Pace
from fedsplit.plan import Route


@dataclass(frozen=True)
class UnitProfile:
    """Cost of one unit (embeddings, a block, or the head) for **one sample**.

    FLOPs count a multiply-add as two. Bytes that depend on the batch (activation, boundary) are
    per sample; parameter, adapter and optimizer bytes are once per model, adapter set and branch.
    `parameter_bytes` counts all weights, `adapter_bytes` those of them that are trained.
    `activation_bytes` is what the forward pass keeps for the backward pass; `workspace_bytes` what
    the unit needs on top while it computes. So a segment's peak is the sum of the one and the
    largest of the other.
    """

    forward_flops: float = 0.0
    backward_flops: float = 0.0
    parameter_bytes: float = 0.0
    adapter_bytes: float = 0.0
    optimizer_bytes: float = 0.0
    activation_bytes: float = 0.0
    boundary_bytes: float = 0.0
    workspace_bytes: float = 0.0

    def __add__(self, other: "UnitProfile") -> "UnitProfile":
        """Return the cost of both units; the boundary is that of `other`, which comes last.

        They compute one after the other, so that workspace does not add up.
        """
        summed = {
            item.name: getattr(self, item.name) + getattr(other, item.name)
            for item in fields(self)
            if item.name not in ("boundary_bytes", "workspace_bytes")
        }
        return UnitProfile(
            **summed,
            boundary_bytes=other.boundary_bytes,
            workspace_bytes=max(self.workspace_bytes, other.workspace_bytes),
        )


def total(units: Iterable[UnitProfile]) -> UnitProfile:
    """Return the cost of `units` in order (all zero for none)."""
    result = UnitProfile()
    for unit in units:
        result = result + unit
    return result


@dataclass(frozen=True)
class SharedWeights:
    """Weights that several units use (tied embeddings): counted to each, held once by a tier.

    Parameters
    ----------
    units : tuple of int
        Their users: 0 for the embeddings, ``i + 1`` for block i, ``n_blocks + 1`` for the head.
    parameter_bytes, adapter_bytes, optimizer_bytes : float
        As in `UnitProfile`.
    """

    units: tuple[int, ...]
    parameter_bytes: float
    adapter_bytes: float = 0.0
    optimizer_bytes: float = 0.0


@dataclass(frozen=True)
class TensorForm:
    """A tensor on the wire: torch's name of its type, bytes of an element, shape of one sample."""

    dtype: str = "float32"
    itemsize: int = 4
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Crossing:
    """What crosses a cut with one mini-batch.

    Parameters
    ----------
    boundary : TensorForm
        The boundary behind the first block; behind others it may have another shape.
    layout : str
        How it is described to the other end (`fedsplit.models.Boundary`).
    inputs : dict of str to TensorForm
        What goes on beside it, such as the mask.
    labels : dict of str to TensorForm
        What goes on unless the route returns to the device.
    """

    boundary: TensorForm = TensorForm()
    layout: str = ""
    inputs: dict[str, TensorForm] = field(default_factory=dict)
    labels: dict[str, TensorForm] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """Bytes of a message beside its boundary: ``fixed_bytes + samples sample_bytes``."""

    fixed_bytes: float = 0.0
    sample_bytes: float = 0.0

    def bytes(self, samples: int) -> float:
        """Return the bytes that a mini-batch of `samples` adds to its boundary."""
        return self.fixed_bytes + samples * self.sample_bytes


@dataclass(frozen=True)
class Messages:
    """What links carry beside boundaries and gradients: headers, masks, labels.

    Parameters
    ----------
    step, step_reply : Message
        A mini-batch on an open route, and its answer.
    forward, forward_reply, backward, backward_reply : Message
        The two calls of a mini-batch on a route that returns to the device, and their answers.
    bare_step_reply, bare_backward_reply : Message
        Answers without a gradient, where nothing before the cut is trained.
    turn_up, turn_down : float
        Once a turn: to enter and to leave it.
    """

    step: Message = Message()
    step_reply: Message = Message()
    forward: Message = Message()
    forward_reply: Message = Message()
    backward: Message = Message()
    backward_reply: Message = Message()
    bare_step_reply: Message = Message()
    bare_backward_reply: Message = Message()
    turn_up: float = 0.0
    turn_down: float = 0.0


@dataclass(frozen=True)
class ModelProfile:
    """Cost of a model for one sample of `seq_len` tokens, unit by unit.

    Parameters
    ----------
    name : str
        Model name, for tables.
    seq_len : int
        Tokens (or patches) per sample that the figures hold for.
    embed, head : UnitProfile
        What comes before the first and after the last block.
    blocks : tuple of UnitProfile
        The blocks; ``blocks[i].boundary_bytes`` is the raw size of the boundary at cut ``i + 1``,
        ``embed.boundary_bytes`` that at cut 0.
    source : str
        "counted" (FLOPs and bytes from the model's graph) or "measured" (timed on a machine).
    shared : tuple of SharedWeights
        Weights that several units use.
    crossing : Crossing
        The form of what crosses a cut.
    messages : Messages
        What crosses a cut beside boundaries (`fedsplit.transport.with_messages`); nothing by
        default, as in papers.
    recomputed : bool
        Whether blocks are computed again in the backward pass (`checkpointed`).
    rank : int or None
        Rank of the adapters that it counts; those of a turn of a lower rank are smaller in that
        proportion (heads that are trained whole are counted so too; FLOPs are those of all).
    pace : Pace
        Which mini-batches are under way together; one by default.
    """

    name: str
    seq_len: int
    embed: UnitProfile
    blocks: tuple[UnitProfile, ...]
    head: UnitProfile
    source: str = "counted"
    shared: tuple[SharedWeights, ...] = ()
    crossing: Crossing = Crossing()
    messages: Messages = Messages()
    recomputed: bool = False
    rank: int | None = None
    pace: Pace = Pace()  # noqa: RUF009 - frozen

    def share(self, rank: int | None) -> float:
        """Return how large adapters of `rank` are beside those that are counted."""
        return 1.0 if rank is None or self.rank is None else min(rank / self.rank, 1.0)

    def at_rank(self, rank: int | None) -> "ModelProfile":
        """Return the same model with adapters of `rank` (FLOPs stay those of all)."""
        share = self.share(rank)
        return self._each(
            lambda each: {
                "parameter_bytes": each.parameter_bytes - (1 - share) * each.adapter_bytes,
                "adapter_bytes": share * each.adapter_bytes,
                "optimizer_bytes": share * each.optimizer_bytes,
            }
        )

    def inferring(self) -> "ModelProfile":
        """Return the same model without what only training takes; its weights are as many."""
        still = {"backward_flops": 0.0, "activation_bytes": 0.0}
        found = self._each(
            lambda each: {
                "parameter_bytes": each.parameter_bytes,
                "adapter_bytes": 0.0,
                "optimizer_bytes": 0.0,
            }
        )
        embed, *blocks, head = (replace(unit, **still) for unit in found.units)
        return replace(found, embed=embed, blocks=tuple(blocks), head=head)

    def _each(
        self, change: Callable[[UnitProfile | SharedWeights], dict[str, float]]
    ) -> "ModelProfile":
        """Return the same model with other weights in its units, and in what they share."""
        embed, *blocks, head = (replace(unit, **change(unit)) for unit in self.units)
        shared = tuple(SharedWeights(group.units, **change(group)) for group in self.shared)
        return replace(self, embed=embed, blocks=tuple(blocks), head=head, shared=shared)

    def checkpointed(self) -> "ModelProfile":
        """Return the same model with blocks that keep their input only.

        In the backward pass each is computed again, and needs what it did not keep until it is
        done.
        """
        inputs = [unit.boundary_bytes for unit in (self.embed, *self.blocks)]
        blocks = tuple(
            replace(
                block,
                backward_flops=block.forward_flops + block.backward_flops,
                activation_bytes=before,
                workspace_bytes=block.activation_bytes + block.workspace_bytes,
            )
            for block, before in zip(self.blocks, inputs[:-1], strict=True)
        )
        return replace(self, blocks=blocks, recomputed=True)

    def shortened(self, part: float) -> "ModelProfile":
        """Return the same model where `part` of a sample's tokens cross a cut: no padding."""
        embed, *blocks = (
            replace(unit, boundary_bytes=part * unit.boundary_bytes)
            for unit in (self.embed, *self.blocks)
        )
        return replace(self, embed=embed, blocks=tuple(blocks))

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def itemsize(self) -> int:
        """Bytes of an element of a boundary."""
        return self.crossing.boundary.itemsize

    def segments(self, route: Route) -> tuple[UnitProfile, ...]:
        """Return the cost of each segment of `route`, in order.

        The embeddings count to the first segment, the head to the last.

        Raises
        ------
        FedsplitError
            If `route` is for another number of blocks.
        """
        require(route.n_blocks == self.n_blocks, "route", str(route), f"{self.n_blocks} blocks")
        last = len(route.segments) - 1
        return tuple(
            self.total(range(segment.start + (i > 0), segment.stop + 1 + (i == last)))
            for i, segment in enumerate(route.segments)
        )

    @property
    def units(self) -> tuple[UnitProfile, ...]:
        """Embeddings, blocks and head, in order."""
        return (self.embed, *self.blocks, self.head)

    def total(self, units: Iterable[int] | None = None) -> UnitProfile:
        """Return the cost of some `units` (by their place in `units`; all by default) on one tier.

        Weights that several of them share count once.
        """
        places = range(len(self.units)) if units is None else tuple(units)
        whole = total(self.units[place] for place in places)
        for group in self.shared:
            again = max(len(set(group.units) & set(places)) - 1, 0)
            whole = replace(
                whole,
                parameter_bytes=whole.parameter_bytes - again * group.parameter_bytes,
                adapter_bytes=whole.adapter_bytes - again * group.adapter_bytes,
                optimizer_bytes=whole.optimizer_bytes - again * group.optimizer_bytes,
            )
        return whole


@dataclass(frozen=True, kw_only=True)
class MeasuredProfile:
    """How long a machine really takes for a model; a small file (`write`, `read`).

    Parameters
    ----------
    model : str
        The model's name.
    seq_len, batch : int
        The mini-batch that was timed.
    forward_s, backward_s : tuple of float
        Seconds of each unit for the whole mini-batch (embeddings, blocks, head); backward with the
        update of what the unit trains.
    memory_bytes : float or None
        Memory of the machine.
    power_w : float or None
        What it took meanwhile, where the board tells.
    """

    model: str
    seq_len: int
    batch: int
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    memory_bytes: float | None = None
    power_w: float | None = None

    def __post_init__(self) -> None:
        for name in ("forward_s", "backward_s"):
            times = getattr(self, name)
            good = len(times) > 1 and all(0 <= one < float("inf") for one in times)
            require(good, f"measured.{name}", times, "finite seconds, at least 0, of every unit")
        same = len(self.forward_s) == len(self.backward_s)
        require(same, "measured.backward_s", len(self.backward_s), f"{len(self.forward_s)} units")
        for name in ("batch", "seq_len"):
            count = getattr(self, name)
            require(count >= 1, f"measured.{name}", count, "at least 1")
        for name in ("memory_bytes", "power_w"):
            value = getattr(self, name)
            allowed = value is None or 0 < value < 1e18
            require(allowed, f"measured.{name}", value, "null, or above 0 and below 1e18")

    def fits(self, profile: ModelProfile) -> bool:
        """Return whether it may be of the model of `profile`."""
        return len(self.forward_s) == len(profile.units) and self.seq_len == profile.seq_len

    def flops_per_s(self, profile: ModelProfile) -> float:
        """Return the speed at which the whole model takes the time measured; 0 if it takes none."""
        seconds = sum(self.forward_s) + sum(self.backward_s)
        whole = profile.total()
        flops = float(self.batch * (whole.forward_flops + whole.backward_flops))
        return flops / seconds if seconds > 0 else 0.0

    def seconds(self, profile: ModelProfile) -> ModelProfile:
        """Return `profile` with seconds of a sample on this machine in place of its FLOPs.

        Raises
        ------
        FedsplitError
            If it is of a model with another number of blocks, or of another sequence length.
        """
        units = profile.units
        require(
            len(self.forward_s) == len(units),
            "measured units",
            len(self.forward_s),
            str(len(units)),
        )
        fits = self.seq_len == profile.seq_len
        require(fits, "measured.seq_len", self.seq_len, f"{profile.seq_len}, as the profile")
        again = [0.0, *(profile.recomputed * up for up in self.forward_s[1:-1]), 0.0]
        timed = [
            replace(unit, forward_flops=up / self.batch, backward_flops=(down + more) / self.batch)
            for unit, up, down, more in zip(
                units, self.forward_s, self.backward_s, again, strict=True
            )
        ]
        return replace(
            profile,
            embed=timed[0],
            blocks=tuple(timed[1:-1]),
            head=timed[-1],
            source="measured",
        )

    def write(self, path: str | Path) -> None:
        """Write the file, JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "MeasuredProfile":
        """Read a file that `write` made.

        Raises
        ------
        FedsplitError
            If it cannot be read, or is not such a file.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise FedsplitError(f"measured profile {path}: {error}") from error
        try:
            return cls.parse(text)
        except FedsplitError as error:
            raise FedsplitError(f"measured profile {path}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> "MeasuredProfile":
        """Return what the text of such a file says.

        Raises
        ------
        FedsplitError
            If it is not the text of such a file.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FedsplitError(f"measured={text!r:.40}: must be JSON ({error})") from error
        require(isinstance(values, dict), "measured", type(values).__name__, "a mapping")
        return from_mapping(cls, values, "measured")
