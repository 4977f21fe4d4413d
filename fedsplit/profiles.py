"""What a model costs, unit by unit: plain numbers that planners and the timeline read.

`fedsplit.models.profile` fills these in from a real model; nothing here imports torch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from fedsplit.errors import require
from fedsplit.pace import Pace
from fedsplit.plan import Route


@dataclass(frozen=True)
class LowRank:
    """Adapters of a unit that are products of two factors; costs are those at their whole rank.

    Parameters
    ----------
    n_bytes, forward_flops : float
        Of both factors; FLOPs for one sample.
    most : float
        How many times as many components the matrix has that they change.
    """

    n_bytes: float
    forward_flops: float
    most: float


@dataclass(frozen=True)
class UnitProfile:
    """Cost of one unit (embeddings, a block, or the head) for **one sample**.

    FLOPs count a multiply-add as two. Bytes that depend on the batch (activation, boundary) are
    per sample; parameter, adapter and optimizer bytes are once per model, adapter set and branch.
    `parameter_bytes` counts all weights, `adapter_bytes` those of them that are trained.
    `activation_bytes` is what the forward pass keeps for the backward pass; `workspace_bytes` what
    the unit needs on top while it computes. So a segment's peak is the sum of the one and the
    largest of the other. `residual_bytes` are those weights that come with the adapters of a turn
    and are not trained (`ModelProfile.beside`); `low_rank` says what they may be.
    """

    forward_flops: float = 0.0
    backward_flops: float = 0.0
    parameter_bytes: float = 0.0
    adapter_bytes: float = 0.0
    optimizer_bytes: float = 0.0
    activation_bytes: float = 0.0
    boundary_bytes: float = 0.0
    workspace_bytes: float = 0.0
    residual_bytes: float = 0.0
    low_rank: tuple[LowRank, ...] = ()

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

    def beside(self, components: int) -> "ModelProfile":
        """Return the same model with a residual of so many components beside its adapters.

        They are weights that nobody trains. Going back, gradients pass them as they do any other.
        """
        if components == 0 or self.rank is None:
            return self
        ratio = components / self.rank

        def heavier(unit: UnitProfile) -> UnitProfile:
            times = [(min(ratio, one.most), one) for one in unit.low_rank]
            more_bytes = sum(share * one.n_bytes for share, one in times)
            flops = sum(share * one.forward_flops for share, one in times)
            return replace(
                unit,
                forward_flops=unit.forward_flops + flops,
                backward_flops=unit.backward_flops + flops * (1 + self.recomputed),
                parameter_bytes=unit.parameter_bytes + more_bytes,
                residual_bytes=unit.residual_bytes + more_bytes,
            )

        embed, *blocks, head = map(heavier, self.units)
        return replace(self, embed=embed, blocks=tuple(blocks), head=head)

    def inferring(self) -> "ModelProfile":
        """Return the same model without what only training takes; its weights are as many."""
        still: dict[str, Any] = {"backward_flops": 0.0, "activation_bytes": 0.0}
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
        self, change: Callable[[UnitProfile | SharedWeights], dict[str, Any]]
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
