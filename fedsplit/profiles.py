"""What a model costs, unit by unit: plain numbers that planners and the timeline read.

`fedsplit.models.profile` fills these in from a real model; nothing here imports torch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from fedsplit.errors import require
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
    """

    name: str
    seq_len: int
    embed: UnitProfile
    blocks: tuple[UnitProfile, ...]
    head: UnitProfile
    source: str = "counted"

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def segments(self, route: Route) -> tuple[UnitProfile, ...]:
        """Return the cost of each segment of `route`, in order.

        The embeddings count to the first segment, the head to the last.

        Raises
        ------
        FedsplitError
            If `route` is for another number of blocks.
        """
        require(route.n_blocks == self.n_blocks, "route", str(route), f"{self.n_blocks} blocks")
        parts = [list(self.blocks[segment.start : segment.stop]) for segment in route.segments]
        parts[0].insert(0, self.embed)
        parts[-1].append(self.head)
        return tuple(total(part) for part in parts)

    def per_block(self, read: Callable[[UnitProfile], float]) -> NDArray[np.float64]:
        """Return ``read(block)`` for every block, shape ``[n_blocks]``."""
        return np.array([read(block) for block in self.blocks], dtype=np.float64)
