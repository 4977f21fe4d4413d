"""Cut, codec, bands and server clock together, with a cut of its own for every device.

Beyond the papers: SFT's problem with the same devices, codecs and limits, but each device may be
cut elsewhere and the server's speed is divided as the bands are. Lagrange multipliers for time,
bands, clock and loss make the devices independent: each answers prices with its best option (cut
and setting). The answers' exact division gives a plan and new prices; what the answers cost at the
averaged prices is a bound that no plan can pass.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.errors import require
from fedsplit.planning.bandwidth import Allocation, minmax_shares
from fedsplit.planning.codec_table import CodecTable
from fedsplit.planning.newton import least_priced_s
from fedsplit.planning.pools import LinearPool, ShannonPool
from fedsplit.planning.sft import SftProblem, plan_large_timescale

Ints = NDArray[np.int64]
_TINY = 1e-300
_PRICE_STEPS = 60


@dataclass(frozen=True, eq=False, kw_only=True)
class JointPlan:
    """A round of devices that train in parallel; arrays have shape ``[N]``.

    Parameters
    ----------
    cut : ndarray of int
        Blocks on each device.
    setting : ndarray of int
        Row of `table` for each device.
    table : CodecTable
        The settings that are worth using.
    uplink_hz, downlink_hz : ndarray
        Shares of the bands.
    server_flops_per_s : ndarray
        Shares of the server's speed.
    delay_s : ndarray
        Delay of each device.
    round_s : float
        Delay of the round.
    bound_s : float
        No plan is faster.
    """

    cut: Ints
    setting: Ints
    table: CodecTable
    uplink_hz: Array
    downlink_hz: Array
    server_flops_per_s: Array
    delay_s: Array
    round_s: float
    bound_s: float

    @property
    def gap(self) -> float:
        """Relative distance from the bound, at least 0."""
        return max(0.0, 1.0 - self.bound_s / self.round_s)

    @property
    def ratio(self) -> Array:
        """Codec ratio of each device."""
        return self.table.ratio[self.setting]


def plan_joint(
    problem: SftProblem,
    *,
    divide_server: bool = True,
    iterations: int = 30,
    trials: int = 60,
    tolerance: float = 1e-3,
) -> JointPlan:
    """Minimise the delay of a round over each device's cut and codec, both bands and the clock.

    It starts from SFT's plan, a common cut, and is never slower than that.

    Parameters
    ----------
    problem : SftProblem
        The fleet on the channel of the round.
    divide_server : bool
        Whether the sum of `server_flops_per_s` is divided anew, or each device keeps its own.
    iterations : int
        Most exchanges of prices and answers.
    trials : int
        Most single changes tried on the best plan at the end.
    tolerance : float
        Stop when the plan is certified to be this near to the best, relatively.

    Returns
    -------
    JointPlan
        With a bound that holds whatever the plan.

    Raises
    ------
    InfeasibleError
        As `sft.plan_large_timescale`.
    FedsplitError
        If `iterations` is below 1.
    """
    require(iterations >= 1, "iterations", iterations, "at least 1")
    common = plan_large_timescale(problem)
    options = _Options(problem, common.table, divide_server)
    chosen = common.cut * len(common.table) + common.setting
    best, bound = options.divide(chosen), 0.0
    multipliers = _logs(best)
    for iteration in range(1, iterations + 1):
        costs = options.priced(np.exp(multipliers))
        answer, loss_price = options.answer(costs)
        bound = max(bound, options.bound(costs, np.exp(multipliers), loss_price))
        latest = options.divide(answer)
        if latest.objective_s < best.objective_s:
            best, chosen = latest, answer
        if 1 - bound / best.objective_s <= tolerance:
            break
        multipliers += 2 / (iteration + 2) * (_logs(latest) - multipliers)
    else:
        best, chosen = _change_one(options, best, chosen, costs, trials)
    cut, setting = np.divmod(chosen, len(common.table))
    return JointPlan(
        cut=cut,
        setting=setting,
        table=common.table,
        uplink_hz=best.shares[0],
        downlink_hz=best.shares[1],
        server_flops_per_s=(
            best.shares[2] if divide_server else np.asarray(problem.server_flops_per_s)
        ),
        delay_s=best.delay_s,
        round_s=best.objective_s,
        bound_s=min(bound, best.objective_s),
    )


def _logs(allocation: Allocation) -> Array:
    """Return the logarithms of the users' weights and the pools' prices, ``[N + 3]``."""
    values = np.concatenate([allocation.weights, allocation.prices])
    logs: Array = np.log(np.maximum(values, _TINY))
    return logs


def _change_one(
    options: "_Options", best: Allocation, chosen: Ints, costs: Array, trials: int
) -> tuple[Allocation, Ints]:
    """Try the single changes of option that cost least at the last prices."""
    everyone = np.arange(len(chosen))[:, None]
    extra = costs - costs[everyone, chosen[:, None]]
    extra[everyone, chosen[:, None]] = np.inf
    for flat in np.argsort(extra, axis=None)[:trials]:
        device, option = divmod(int(flat), extra.shape[1])
        if not np.isfinite(extra[device, option]):
            break
        changed = chosen.copy()
        changed[device] = option
        if options.loss_of(changed) > options.loss_limit:
            continue
        found = options.divide(changed)
        if found.objective_s < best.objective_s:
            best, chosen = found, changed
    return best, chosen


class _Options:
    """Every device's choices: cut times codec setting; arrays ``[N, O]`` and ``[O]``."""

    def __init__(self, problem: SftProblem, table: CodecTable, divide_server: bool) -> None:
        costs, devices = problem.costs, problem.devices
        n_devices, ratio = len(devices), table.ratio
        shape = (n_devices, (costs.n_blocks + 1) * len(table))
        steps = np.asarray(devices.steps)[:, None, None]
        gradient_ratio = ratio if problem.compress_gradients else np.ones_like(ratio)

        def sent(bits: Array, ratio: Array) -> Array:
            each: Array = costs.adapter_bits[:, None] + steps * (bits[:, None] * ratio)
            return each.reshape(shape)

        def per_cut(values: Array) -> Array:
            return np.repeat(values, len(table), axis=1)

        self.loss_limit = problem.loss_limit
        self._shares_of_data = problem.shares_of_data
        self._snr_hz = problem.uplink_snr_hz
        self._budgets = (
            problem.uplink_hz,
            problem.downlink_hz,
            float(np.sum(problem.server_flops_per_s)),
        )
        self._bits = sent(costs.uplink_bits, ratio)
        self._down = (
            sent(costs.downlink_bits, gradient_ratio) / problem.downlink_efficiency[:, None]
        )
        served = steps[:, 0] * costs.server_flops
        self._server = per_cut(served if divide_server else np.zeros_like(served))
        allowed = devices.allowed_cuts(costs, problem.min_cut)
        compute = steps[:, 0] * (costs.device_flops / devices.flops_per_s[:, None])
        if not divide_server:
            compute = compute + served / np.asarray(problem.server_flops_per_s)[:, None]
        self._fixed = per_cut(np.where(allowed, compute, np.inf))
        self._loss = np.tile(table.loss_increase, costs.n_blocks + 1)

    def divide(self, chosen: Ints) -> Allocation:
        """Return the exact division of bands and clock for one option per device."""
        own = np.arange(len(chosen)), chosen
        up, down, server = self._budgets
        return minmax_shares(
            [
                ShannonPool(self._bits[own], self._snr_hz, up, "uplink band"),
                LinearPool(self._down[own], down, "downlink band"),
                LinearPool(self._server[own], server, "server"),
            ],
            self._fixed[own],
        )

    def priced(self, multipliers: Array) -> Array:
        """Return each option's least weighted delay plus the price of its shares, ``[N, O]``."""
        weight = multipliers[:-3, None] / multipliers[:-3].sum()
        up, down, server = multipliers[-3:]
        result: Array = (
            weight * self._fixed
            + least_priced_s(self._bits, self._snr_hz[:, None], weight, float(up))
            + 2 * np.sqrt(weight * down * self._down)
            + 2 * np.sqrt(weight * server * self._server)
        )
        return result

    def loss_of(self, chosen: Ints) -> float:
        """Return the weighted loss increase of one option per device."""
        return float(self._shares_of_data @ self._loss[chosen])

    def answer(self, costs: Array) -> tuple[Ints, float]:
        """Return each device's cheapest option within the loss limit, and the price of loss."""
        harm = self._shares_of_data[:, None] * self._loss

        def cheapest(price: float) -> Ints:
            options: Ints = (costs + price * harm).argmin(axis=1)
            return options

        chosen, low, high = cheapest(0.0), 0.0, float(costs.min(axis=1).sum())
        if self.loss_of(chosen) <= self.loss_limit:
            return chosen, 0.0
        while self.loss_of(cheapest(high)) > self.loss_limit:
            high *= 8
        for _ in range(_PRICE_STEPS):
            middle = (low + high) / 2
            if self.loss_of(cheapest(middle)) > self.loss_limit:
                low = middle
            else:
                high = middle
        return cheapest(high), high

    def bound(self, costs: Array, multipliers: Array, loss_price: float) -> float:
        """Return the value of the Lagrange dual: no plan's delay is below it."""
        harm = self._shares_of_data[:, None] * self._loss
        least = (costs + loss_price * harm).min(axis=1).sum()
        spent = multipliers[-3:] @ np.array(self._budgets)
        return float(least - spent - loss_price * self.loss_limit)
