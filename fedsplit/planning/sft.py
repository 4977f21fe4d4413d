"""SFT's two timescales: codec and block allocation once in a while, spectrum every round.

Split fine-tuning (arXiv 2501.09237); papers' section 2. All devices train in parallel with the same
cut. The large timescale chooses the cut and each device's codec setting on the mean channel, under
device memory and a limit on the rise of the loss; the small one divides the bands on each round's
channel. Here are the model and the exact methods; `sft_alm` has the paper's own for the large
timescale and `sqp` that for the small one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsplit.arrays import Array
from fedsplit.errors import require, require_choice
from fedsplit.planning.bandwidth import Allocation, minmax_shares
from fedsplit.planning.codec_table import CodecTable
from fedsplit.planning.costs import CutCosts, Devices
from fedsplit.planning.errors import InfeasibleError, checked, checked_links
from fedsplit.planning.pools import LinearPool, Pool, ShannonPool, shannon_bps
from fedsplit.planning.sqp import minmax_shares_sqp

_BISECTIONS = 60


@dataclass(frozen=True, eq=False, kw_only=True)
class SftProblem:
    """A fleet that fine-tunes with SFT; arrays have shape ``[N]``, scalars are repeated.

    Parameters
    ----------
    costs : CutCosts
        The model, uncompressed.
    devices : Devices
        Speed, memory and mini-batches of each device.
    table : CodecTable
        Measured codec settings to choose from.
    max_loss_increase : float
        Limit on the rise of the loss, averaged over devices by `data_weights`: each device's
        batches suffer what was measured of its setting.
    uplink_snr_hz : array_like
        ``gain * power / noise density``, Hz.
    downlink_efficiency : array_like
        bit/s/Hz of each downlink; the station spreads its power evenly over the band.
    uplink_hz, downlink_hz : float
        The bands.
    server_flops_per_s : array_like
        Speed that the server gives to each device.
    data_weights : array_like
        Weight of each device's data, such as its number of samples.
    compress_gradients : bool
        Whether gradients are compressed with the same setting as activations.
    min_cut, max_cut : int
        Least and, unless None, most number of blocks on a device.

    Raises
    ------
    InfeasibleError
        If a band or a device's channel carries nothing.
    FedsplitError
        If a value is NaN, negative, or 0 where that makes no sense.
    """

    costs: CutCosts
    devices: Devices
    table: CodecTable
    max_loss_increase: float
    uplink_snr_hz: Array
    downlink_efficiency: Array
    uplink_hz: float
    downlink_hz: float
    server_flops_per_s: ArrayLike
    data_weights: ArrayLike = 1.0
    compress_gradients: bool = False
    min_cut: int = 1
    max_cut: int | None = None

    def __post_init__(self) -> None:
        shape = (len(self.devices),)
        bits = np.asarray(self.devices.steps) * self.costs.uplink_bits.min()
        for name in ("uplink_snr_hz", "downlink_efficiency"):
            value = checked_links(name, getattr(self, name), shape, bits)
            object.__setattr__(self, name, value)
        for name in ("uplink_hz", "downlink_hz"):
            checked_links(name, [getattr(self, name)], (1,), bits.sum())
        speed = checked("server_flops_per_s", self.server_flops_per_s, shape, positive=True)
        object.__setattr__(self, "server_flops_per_s", speed)
        weights = checked("data_weights", self.data_weights, shape)
        require(weights.sum() > 0, "data_weights", weights.tolist(), "not all 0")
        object.__setattr__(self, "data_weights", weights)
        checked("max_loss_increase", self.max_loss_increase)
        most, blocks = self.max_cut, self.costs.n_blocks
        fits = most is None or self.min_cut <= most <= blocks
        require(fits, "max_cut", most, f"{self.min_cut} to {blocks}")

    @property
    def shares_of_data(self) -> Array:
        """Data weights that add up to 1, shape ``[N]``."""
        weights = np.asarray(self.data_weights, dtype=np.float64)
        normed: Array = weights / weights.sum()
        return normed

    @property
    def loss_limit(self) -> float:
        """`max_loss_increase` with room for rounding in averages."""
        return self.max_loss_increase + 1e-12 * (1 + self.max_loss_increase)

    def delay_terms(self) -> tuple[Array, Array]:
        """Return `fixed` and `per_ratio`, each ``[N, L + 1]``, at equal shares of the bands.

        A round of device n with cut c and codec ratio rho takes ``fixed + per_ratio rho`` seconds.
        """
        costs, n_devices = self.costs, len(self.devices)
        up = shannon_bps(self.uplink_hz / n_devices, self.uplink_snr_hz)[:, None]
        down = (self.downlink_efficiency * self.downlink_hz / n_devices)[:, None]
        steps = np.asarray(self.devices.steps)[:, None]
        compute = (
            costs.device_flops / self.devices.flops_per_s[:, None]
            + costs.server_flops / np.asarray(self.server_flops_per_s)[:, None]
        )
        gradients = steps * costs.downlink_bits / down
        fixed = costs.adapter_bits * (1 / up + 1 / down) + steps * compute
        per_ratio = steps * costs.uplink_bits / up
        if self.compress_gradients:
            return fixed, per_ratio + gradients
        return fixed + gradients, per_ratio

    def pools(self, cut: int, ratio: Array) -> tuple[list[Pool], Array]:
        """Return what a round with this cut and codec sends, and its compute time ``[N]``."""
        costs, steps = self.costs, np.asarray(self.devices.steps)
        up = costs.adapter_bits[cut] + steps * costs.uplink_bits[cut] * ratio
        gradient_ratio = ratio if self.compress_gradients else 1.0
        down = costs.adapter_bits[cut] + steps * costs.downlink_bits[cut] * gradient_ratio
        compute = steps * (
            costs.device_flops[cut] / self.devices.flops_per_s
            + costs.server_flops[cut] / np.asarray(self.server_flops_per_s)
        )
        return [
            ShannonPool(up, self.uplink_snr_hz, self.uplink_hz, "uplink band"),
            LinearPool(down / self.downlink_efficiency, self.downlink_hz, "downlink band"),
        ], compute


@dataclass(frozen=True, eq=False)
class SftPlan:
    """Cut and codec settings for the large timescale.

    Parameters
    ----------
    cut : int
        Blocks on every device.
    setting : ndarray of int
        Row of `table` for each device, shape ``[N]``.
    table : CodecTable
        The settings that are worth using.
    round_s : float
        Delay of a round with equal shares of the bands.
    """

    cut: int
    setting: NDArray[np.int64]
    table: CodecTable
    round_s: float

    @property
    def ratio(self) -> Array:
        """Codec ratio of each device, shape ``[N]``."""
        return self.table.ratio[self.setting]


def plan_large_timescale(problem: SftProblem, cuts: ArrayLike | None = None) -> SftPlan:
    """Choose the common cut and each device's codec setting, exactly.

    For a cut and a delay every device takes the mildest setting that keeps the delay; the loss then
    falls as the delay rises, so bisection finds the least delay within the limit. All cuts are
    bisected at once.

    Parameters
    ----------
    problem : SftProblem
        The fleet, on its mean channel.
    cuts : array_like of int, optional
        The cuts to choose from; all by default.

    Raises
    ------
    InfeasibleError
        If no cut fits every device's memory, or no setting keeps the loss within its limit; says
        by how much.
    """
    table = problem.table.envelope()
    weights = problem.shares_of_data
    if table.loss_increase[-1] > problem.loss_limit:
        raise InfeasibleError(
            "loss increase of the mildest codec setting",
            table.loss_increase[-1],
            problem.max_loss_increase,
            "(loss)",
        )
    fixed, per_ratio = problem.delay_terms()
    candidates = common_cuts(problem)
    if cuts is not None:
        candidates = np.intersect1d(candidates, np.asarray(cuts))
        require(len(candidates) > 0, "cuts", cuts, "some that fit all devices")
    fixed, per_ratio = fixed[:, candidates], per_ratio[:, candidates]

    def settings(limit_s: Array) -> NDArray[np.int64]:
        # Rounding must not lose the setting that defines the limit.
        with np.errstate(over="ignore"):
            room = (limit_s * (1 + 1e-12) - fixed) / per_ratio
        return np.searchsorted(table.ratio, room, side="right") - 1

    per_ratio = np.maximum(per_ratio, np.finfo(float).tiny)
    low = (fixed + per_ratio * table.ratio[0]).max(axis=0)
    high = (fixed + per_ratio * table.ratio[-1]).max(axis=0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        chosen = settings(middle)
        loss = weights @ table.loss_increase[chosen]
        good = (chosen >= 0).all(axis=0) & (loss <= problem.loss_limit)
        low, high = np.where(good, low, middle), np.where(good, middle, high)
    chosen = settings(high)
    reached = (fixed + per_ratio * table.ratio[chosen]).max(axis=0)
    best = int(reached.argmin())
    return SftPlan(int(candidates[best]), chosen[:, best], table, float(reached[best]))


def common_cuts(problem: SftProblem) -> NDArray[np.int64]:
    """Return the cuts that every device can have.

    Raises
    ------
    InfeasibleError
        If there is none; names the device with the least memory.
    """
    smallest = int(np.argmin(problem.devices.memory_bytes))
    allowed = problem.devices.allowed_cuts(problem.costs, problem.min_cut, problem.max_cut)
    return np.flatnonzero(allowed[smallest])


def plan_small_timescale(
    problem: SftProblem, cut: int, ratio: Array, *, method: str = "exact"
) -> Allocation:
    """Divide both bands for a round so that the last device finishes as early as possible.

    Parameters
    ----------
    problem : SftProblem
        The fleet, on the channel of the round.
    cut : int
        Blocks on every device.
    ratio : ndarray
        Codec ratio of each device, shape ``[N]``.
    method : str
        "exact", or "sqp", the paper's.

    Returns
    -------
    Allocation
        ``shares`` are those of the uplink and of the downlink, Hz.
    """
    methods = {"exact": minmax_shares, "sqp": minmax_shares_sqp}
    require_choice("method", method, methods)
    return methods[method](*problem.pools(cut, ratio))
