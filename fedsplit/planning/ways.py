"""Ways to train a device's part: all of it, at a lower rank, or not at all."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike

from fedsplit.arrays import Array
from fedsplit.planning.codec_table import CodecTable
from fedsplit.planning.costs import CutCosts
from fedsplit.profiles import ModelProfile


@dataclass(frozen=True, eq=False, kw_only=True)
class Way:
    """What a turn costs if its device trains in one of several ways.

    Parameters
    ----------
    costs : CutCosts
        The model, trained in this way.
    loss_increase : array_like
        Rise of the loss by it, scalar or per cut ``[L + 1]``; it adds to that of a codec.
    rank : int or None
        Components of the adapters; None: all.
    frozen : bool
        Whether the device's blocks only infer: no adapters go back, and of a sample that is shown
        again nothing does.
    fresh : array_like
        Share of a turn's samples that a device computes and sends, scalar or ``[N]``.
    """

    costs: CutCosts
    loss_increase: ArrayLike = 0.0
    rank: int | None = None
    frozen: bool = False
    fresh: ArrayLike = field(default=1.0)


def ways_to_train(
    costs: CutCosts, profile: ModelProfile, batch: int, table: CodecTable, fresh: ArrayLike
) -> tuple[Way, ...]:
    """Return the ways that `table` has measured, first the one that trains all.

    Parameters
    ----------
    costs : CutCosts
        Of that one: also says where the model can be cut, and the downlink's codec.
    profile : ModelProfile
        The model; routes may end on the device.
    batch : int
        Samples of a mini-batch.
    table : CodecTable
        Its ranks, those below the model's, and the cuts at which it froze devices.
    fresh : array_like
        As `Way.fresh`, of devices that only infer.
    """
    whole = profile.rank
    ranks: list[tuple[int | None, float]] = [(None, 0.0)]
    ranks += [(r, loss) for r, loss in table.ranks.items() if whole is not None and r < whole]
    ways = []
    for rank, loss in ranks:
        smaller = profile.at_rank(rank)
        here = replace(
            CutCosts.from_profile(smaller, batch, device_only=True),
            downlink_bits=costs.downlink_bits,
            possible=costs.possible,
        )
        ways.append(Way(costs=here, loss_increase=loss, rank=rank))
        if table.frozen:
            ways.append(
                Way(
                    costs=_inferring(here, smaller, batch, tuple(table.frozen)),
                    loss_increase=loss + _per_cut(table, costs.n_blocks),
                    rank=rank,
                    frozen=True,
                    fresh=fresh,
                )
            )
    return tuple(ways)


def _inferring(costs: CutCosts, profile: ModelProfile, batch: int, cuts: Sequence[int]) -> CutCosts:
    """Return `costs` of devices that only infer, cut where that was measured."""
    here = CutCosts.from_profile(profile.inferring(), batch, device_only=True)
    possible = np.isin(np.arange(costs.n_blocks), cuts)  # the last block stays on a server
    possible = np.append(possible, False)
    if costs.possible is not None:
        possible &= costs.possible
    return replace(
        costs,
        device_flops=here.device_flops,
        downlink_bits=np.zeros_like(costs.downlink_bits),
        memory_bytes=here.memory_bytes,
        possible=possible,
    )


def _per_cut(table: CodecTable, n_blocks: int) -> Array:
    """Return the loss increase by frozen depth; 0 where it was not measured."""
    loss = np.zeros(n_blocks + 1)
    for cut, value in table.frozen.items():
        if cut <= n_blocks:
            loss[cut] = value
    return loss
