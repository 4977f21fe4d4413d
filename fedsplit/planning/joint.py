"""Cut, codec, rank, bands and server clock together, with a cut of its own for every device.

Beyond the papers: SFT's problem with the same devices, codecs and limits, but each device may be
cut elsewhere and the server's speed is divided as the bands are. Lagrange multipliers for time,
bands, clock and loss make the devices independent: each answers prices with its best option (cut
and setting). The answers' exact division gives a plan and new prices; what the answers cost at the
averaged prices is a bound that no plan can pass. Where the devices are few, what lies between the
two is searched: plans in order of their own bounds, until the next cannot be better.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.errors import require
from fedsplit.planning.bandwidth import Allocation, minmax_shares
from fedsplit.planning.codec_table import CodecTable
from fedsplit.planning.costs import Devices
from fedsplit.planning.errors import InfeasibleError
from fedsplit.planning.newton import least_priced_s
from fedsplit.planning.pools import LinearPool, ShannonPool
from fedsplit.planning.sft import SftProblem, plan_large_timescale
from fedsplit.planning.ways import Way

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
    way : ndarray of int
        Which of `ways` each device trains in.
    ways : tuple of Way
        What there was to choose from.
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
    way: Ints
    ways: tuple[Way, ...]
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
    ways: Sequence[Way] = (),
    *,
    divide_server: bool = True,
    iterations: int = 30,
    trials: int = 60,
    tolerance: float = 1e-3,
    search: int = 0,
) -> JointPlan:
    """Minimise the delay of a round over each device's cut and codec, both bands and the clock.

    Without `ways` it starts from SFT's plan, a common cut, and is never slower than that.

    Parameters
    ----------
    problem : SftProblem
        The fleet on the channel of the round.
    ways : sequence of Way
        Ways to train that each device may choose from, within its memory; by default the one whose
        costs the problem has. Their loss counts within the problem's limit.
    divide_server : bool
        Whether the sum of `server_flops_per_s` is divided anew, or each device keeps its own.
    iterations : int
        Most exchanges of prices and answers.
    trials : int
        Most single changes tried on the best plan at the end.
    tolerance : float
        Stop when the plan is certified to be this near to the best, relatively.
    search : int
        Most plans looked at in the search that ends with the best one; 0 for none.

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
    table = problem.table.envelope()
    chosen = None
    if not ways:
        common = plan_large_timescale(problem)
        chosen = common.cut * len(table) + common.setting
        ways = (Way(costs=problem.costs),)
    options = _Options(problem, table, divide_server, ways)
    if chosen is None:
        chosen = options.mildest()
    best, bound = options.divide(chosen), 0.0
    multipliers = _logs(best)
    for iteration in range(1, iterations + 1):
        prices = np.exp(multipliers)
        costs = options.priced(prices)
        answer, loss_price = options.answer(costs)
        dual = options.bound(costs, prices, loss_price)
        if iteration == 1 or dual > bound:
            tightest = dual, costs + loss_price * options.harm
        bound = max(bound, dual)
        latest = options.divide(answer)
        if latest.objective_s < best.objective_s:
            best, chosen = latest, answer
        if 1 - bound / best.objective_s <= tolerance:
            break
        multipliers += 2 / (iteration + 2) * (_logs(latest) - multipliers)
    else:
        best, chosen = _change_one(options, best, chosen, costs, trials)
    if search > 0:
        best, chosen, bound = _search(options, best, chosen, *tightest, most=search)
    way, cut, setting = options.of(chosen)
    return JointPlan(
        cut=cut,
        setting=setting,
        table=table,
        way=way,
        ways=tuple(ways),
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


def _search(
    options: "_Options", best: Allocation, chosen: Ints, dual: float, reduced: Array, *, most: int
) -> tuple[Allocation, Ints, float]:
    """Look at plans by rising bounds until no other can be better, or `most` were looked at.

    A plan costs at least the `dual` and, for each device, what its option costs more at the dual's
    prices than its cheapest (`reduced`, ``[N, O]``). Returns the best plan, and a bound.
    """
    extra = reduced - reduced.min(axis=1, keepdims=True)
    order = np.argsort(extra, axis=1, kind="stable")
    extra = np.take_along_axis(extra, order, axis=1)
    everyone, n_options = np.arange(len(order)), order.shape[1]
    # Each plan is made from one by moving a device on, never one before the last that moved.
    heap: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, (0,) * len(order))]
    for _ in range(most):
        if not heap or dual + heap[0][0] >= best.objective_s:
            return best, chosen, best.objective_s
        more, last, place = heapq.heappop(heap)
        plan = order[everyone, np.array(place)]
        if options.loss_of(plan) <= options.loss_limit:
            found = options.divide(plan)
            if found.objective_s < best.objective_s:
                best, chosen = found, plan
        for device in range(last, len(order)):
            now = place[device]
            if now + 1 < n_options:
                step = float(extra[device, now + 1] - extra[device, now])
                if dual + more + step < best.objective_s:
                    moved = (*place[:device], now + 1, *place[device + 1 :])
                    heapq.heappush(heap, (more + step, device, moved))
    return best, chosen, max(dual, min(best.objective_s, dual + (heap[0][0] if heap else 0.0)))


class _Options:
    """Every device's choices: way, cut and codec setting; arrays ``[N, O]`` and ``[O]``."""

    def __init__(
        self, problem: SftProblem, table: CodecTable, divide_server: bool, ways: Sequence[Way]
    ) -> None:
        self._shape = len(ways), problem.costs.n_blocks + 1, len(table)
        self.loss_limit = problem.loss_limit
        self._shares_of_data = problem.shares_of_data
        self._snr_hz = problem.uplink_snr_hz
        self._budgets = (
            problem.uplink_hz,
            problem.downlink_hz,
            float(np.sum(problem.server_flops_per_s)),
        )
        columns = zip(*(_of_way(problem, table, divide_server, way) for way in ways), strict=True)
        self._bits, self._down, self._server, self._fixed = (
            np.concatenate(parts, axis=1) for parts in columns
        )
        if not np.isfinite(self._fixed).any(axis=1).all():
            raise InfeasibleError(*_least_memory(problem, ways))
        cuts = np.zeros(self._shape[1])[:, None]
        self._loss = np.concatenate(
            [
                (np.asarray(way.loss_increase).reshape(-1, 1) + cuts + table.loss_increase).ravel()
                for way in ways
            ]
        )
        self.harm = self._shares_of_data[:, None] * self._loss

    def of(self, chosen: Ints) -> tuple[Ints, Ints, Ints]:
        """Return way, cut and setting of one option per device."""
        way, cut, setting = np.unravel_index(chosen, self._shape)
        return way, cut, setting

    def mildest(self) -> Ints:
        """Return each device's option that harms least; of several, the one that sends least.

        Raises
        ------
        InfeasibleError
            If the loss is above its limit even so.
        """
        possible = np.isfinite(self._fixed)
        harm = np.where(possible, self._loss, np.inf)
        least = harm <= harm.min(axis=1, keepdims=True)
        chosen: Ints = np.where(least, self._bits, np.inf).argmin(axis=1)
        if (loss := self.loss_of(chosen)) > self.loss_limit:
            raise InfeasibleError(
                "loss increase of the mildest ways", loss, self.loss_limit, "(loss)"
            )
        return chosen

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
        harm = self.harm

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
        least = (costs + loss_price * self.harm).min(axis=1).sum()
        spent = multipliers[-3:] @ np.array(self._budgets)
        return float(least - spent - loss_price * self.loss_limit)


def _of_way(
    problem: SftProblem, table: CodecTable, divide_server: bool, way: Way
) -> tuple[Array, Array, Array, Array]:
    """Return uplink bits, downlink work, server work and seconds of a way's options, ``[N, O]``."""
    costs, devices, ratio = way.costs, problem.devices, table.ratio
    shape = (len(devices), (costs.n_blocks + 1) * len(table))
    steps = np.asarray(devices.steps)[:, None, None]
    fresh = np.broadcast_to(way.fresh, len(devices))[:, None, None]
    gradient_ratio = ratio if problem.compress_gradients else np.ones_like(ratio)

    def sent(adapter_bits: Array, steps: Array, bits: Array, ratio: Array) -> Array:
        each: Array = adapter_bits[:, None] + steps * (bits[:, None] * ratio)
        return each.reshape(shape)

    def per_cut(values: Array) -> Array:
        return np.repeat(values, len(table), axis=1)

    up = sent((not way.frozen) * costs.adapter_bits, steps * fresh, costs.uplink_bits, ratio)
    down = sent(costs.adapter_bits, steps, costs.downlink_bits, gradient_ratio)
    served = steps[:, 0] * costs.server_flops
    compute = (steps * fresh)[:, 0] * (costs.device_flops / devices.flops_per_s[:, None])
    if not divide_server:
        compute = compute + served / np.asarray(problem.server_flops_per_s)[:, None]
        served = np.zeros_like(served)
    allowed = devices.fitting_cuts(costs, problem.min_cut)
    fixed = per_cut(np.where(allowed, compute, np.inf))
    return up, down / problem.downlink_efficiency[:, None], per_cut(served), fixed


def _least_memory(problem: SftProblem, ways: Sequence[Way]) -> tuple[str, float, float, str]:
    """Return which device holds no part of the model in any way, and what that would take."""
    devices = problem.devices
    fits = np.any([devices.fitting_cuts(way.costs, problem.min_cut) for way in ways], axis=(0, 2))
    device = int(np.flatnonzero(~fits)[0])
    anyone = Devices(np.ones(1))
    inside = [(way.costs, anyone.fitting_cuts(way.costs, problem.min_cut)[0]) for way in ways]
    least = min(float(costs.memory_bytes[cuts].min(initial=np.inf)) for costs, cuts in inside)
    held = float(np.asarray(devices.memory_bytes)[device])
    return f"memory of device {device} in any way to train", least, held, "bytes"
