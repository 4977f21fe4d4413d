"""The fastest cut of every device of a model that is a chain of blocks, in one pass over arrays."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsplit.planning.costs import CutCosts, Devices
from fedsplit.planning.errors import checked, checked_links


def fastest_cuts(
    costs: CutCosts,
    devices: Devices,
    uplink_bps: ArrayLike,
    downlink_bps: ArrayLike,
    server_flops_per_s: float,
    *,
    min_cut: int = 0,
) -> NDArray[np.int64]:
    """Return the cut of each device whose turn takes least time, shape ``[N]``.

    What `CutSolver` finds by a minimum cut in general is an argmin over blocks here; of equal cuts
    both take the smallest.

    Parameters
    ----------
    costs : CutCosts
        The model, with ``device_only=True`` if a device may have all blocks.
    devices : Devices
        Speed, memory and mini-batches of each device.
    uplink_bps, downlink_bps : array_like
        Rates, scalar or shape ``[N]``.
    server_flops_per_s : float
        Speed of the server.
    min_cut : int
        Privacy floor: at least this many blocks stay on the device.

    Raises
    ------
    InfeasibleError
        If a device cannot hold its smallest allowed part, or has no rate.
    FedsplitError
        If a value is NaN, negative or out of range.
    """
    shape = (len(devices),)
    steps = np.asarray(devices.steps)
    bits = steps * costs.uplink_bits.min()
    up = checked_links("uplink_bps", uplink_bps, shape, bits)[:, None]
    down = checked_links("downlink_bps", downlink_bps, shape, bits)[:, None]
    server = float(checked("server_flops_per_s", server_flops_per_s, positive=True))
    delay_s = costs.adapter_bits * (1 / up + 1 / down) + steps[:, None] * (
        costs.device_flops / devices.flops_per_s[:, None]
        + costs.server_flops / server
        + costs.uplink_bits / up
        + costs.downlink_bits / down
    )
    cut: NDArray[np.int64] = np.where(
        devices.allowed_cuts(costs, min_cut), delay_s, np.inf
    ).argmin(axis=1)  # fmt: skip
    return cut
