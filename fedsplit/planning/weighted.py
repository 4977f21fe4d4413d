"""Cuts, clocks, powers and bands of devices that train side by side, for energy and delay.

Multi-client model splitting (Wei and Chen, arXiv 2608.17849) for mini-batches that do not wait for
each other. A device computes and sends on its own, and waits only while the server works for
somebody, in whatever order; so a round takes at most::

    T = max_n side_n(cut, clock, power, band) + sum_n server_n(cut, server clock)

The least of ``E + lambda T`` is searched over the time that the devices' own side may take. Once
that is fixed, the devices compete for the bands alone: at a price of the band each has a best cut
and share, and the division of its time between computing and sending is convex. What the answers
cost at that price is a bound, whatever is planned.
"""

import heapq
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.planning.exact import SplitProblem, split_exactly
from fedsplit.planning.weighted_problem import WeightedPlan, WeightedProblem

Ints = NDArray[np.int64]
_COARSE, _FINE, _FINE_LEVELS = 4, 64, 32
_HALVINGS = 24
_PRICE_STEPS = 60


def plan_weighted(
    problem: WeightedProblem, *, tolerance: float = 0.01, trials: int = 64
) -> WeightedPlan:
    """Minimise weighted energy and delay over cuts, clocks, powers and shares of the bands.

    It starts from the exact cuts at full clock, full power and equal bands, and is never worse.

    Parameters
    ----------
    problem : WeightedProblem
        The round.
    tolerance : float
        Stop when the plan is certified to be this near to the best, relatively.
    trials : int
        Most times that are tried for the devices' side.

    Raises
    ------
    InfeasibleError
        If a device cannot hold its smallest allowed part.
    """
    options = _Options(problem)
    best = options.full_speed()
    low, high = options.range_s()
    per_second = problem.second_weight

    def tried(seconds: float) -> float:
        """Return a bound on all but delay with so much time, and keep the plan if it is better."""
        nonlocal best
        bound, found = options.at(seconds)
        if found is not None and found.objective < best.objective:
            best = found
        return bound

    # Between two times, a plan has at least the lower's delay and at best the higher's rest.
    cells = [(per_second * low, low, high, 0.0)]
    for fine in (False, True):
        if fine:
            options.look_closer(best.share)
        cells = [
            (max(bound, per_second * low + rest), low, high, rest)
            for bound, low, high, old in cells
            if (rest := max(old, tried(high) if bound < best.objective else old)) < np.inf
        ]
        heapq.heapify(cells)
        for _ in range(trials):
            bound, low, high, rest = cells[0]
            if bound >= best.objective * (1 - tolerance) or high <= low * (1 + tolerance / 8):
                break
            heapq.heappop(cells)
            middle = float(np.sqrt(low * high))
            heapq.heappush(cells, (per_second * middle + rest, middle, high, rest))
            rest = max(rest, tried(middle))
            if np.isfinite(rest):
                heapq.heappush(cells, (per_second * low + rest, low, middle, rest))
    return replace(best, bound=min(cells[0][0], best.objective))


class _Options:
    """What each device may do: cut times fraction of the bands.

    Options are given one by one, as arrays of the same shape of devices, cuts and fractions.
    """

    def __init__(self, problem: WeightedProblem) -> None:
        self._problem = p = problem
        costs, devices, server = p.costs, p.devices, p.server
        steps = np.asarray(devices.steps)[:, None]
        self._allowed = devices.allowed_cuts(costs, p.min_cut)
        clock, least = (np.asarray(values)[:, None] for values in (p.clock_hz, p.min_hz))
        self._cycles = steps * costs.device_flops / devices.flops_per_s[:, None] * clock
        self._least_s, self._most_s = self._cycles / clock, self._cycles / least
        self._bits = costs.adapter_bits + steps * costs.uplink_bits
        down_bits = costs.adapter_bits + steps * costs.downlink_bits
        self._down_s = down_bits / np.asarray(p.downlink_efficiency)[:, None] / p.downlink_hz
        served = steps * costs.server_flops / server.flops_per_cycle
        self._server_hz = server.max_hz
        dear = 2 * server.energy_coefficient * p.joule_weight
        if p.server_share is None and p.second_weight < dear * server.max_hz**3:
            self._server_hz = max(float(np.cbrt(p.second_weight / dear)), server.min_hz)
        served_s = served / self._server_hz
        self._in_line_s = served_s if p.server_share is None else np.zeros_like(served)
        self._beside_s = served_s - self._in_line_s
        if p.server_share is not None:
            self._beside_s = self._beside_s / p.server_share
        # The station's power is spread over the band: a wider share is used for a shorter time.
        self._other_j = (
            server.energy_coefficient * self._server_hz**2 * served + p.power_down_w * self._down_s
        )
        self._others = p.joule_weight * self._other_j + p.second_weight * self._in_line_s
        self._everyone: Ints = np.arange(len(devices))
        octaves = np.log2(8 * len(devices)) if len(devices) > 1 else 0.0
        steps_down = np.arange(int(octaves * _COARSE), -1, -1) / _COARSE
        self._levels: Array = np.tile(np.exp2(-steps_down), (len(devices), 1))

    def look_closer(self, share: Array) -> None:
        """Try more shares near those that are given, ``[N]``."""
        near = share[:, None] * np.exp2(np.arange(-_FINE_LEVELS, _FINE_LEVELS + 1) / _FINE)
        self._levels = np.sort(np.hstack([self._levels, np.minimum(near, 1.0)]), axis=1)

    def _all(self, share: Array) -> tuple[Ints, Ints, Array]:
        """Return all devices and cuts, ``[N, C, L]``, with shares ``[N, L]``."""
        shape = (*self._bits.shape, share.shape[1])
        device, cut = np.indices(shape)[:2]
        return device, cut, np.broadcast_to(share[:, None], shape)

    def _sending_s(self, device: Ints, cut: Ints, share: Array, power: float) -> Array:
        """Return how long it takes to send all bits at this fraction of the power."""
        hertz = share * self._problem.uplink_hz
        snr = power * np.asarray(self._problem.uplink_snr_hz)[device] / hertz
        result: Array = self._bits[device, cut] * np.log(2) / (hertz * np.log1p(snr))
        return result

    def _fixed_s(self, device: Ints, cut: Ints, share: Array) -> Array:
        """Return what takes its time whatever clock and power."""
        result: Array = self._down_s[device, cut] / share + self._beside_s[device, cut]
        return result

    def range_s(self) -> tuple[float, float]:
        """Return what the devices' side takes at least, and at most whatever the plan."""
        p = self._problem
        alone, narrow = self._all(np.ones_like(self._levels[:, :1])), self._all(self._levels[:, :1])
        fast = self._fixed_s(*alone) + self._sending_s(*alone, 1.0) + self._least_s[:, :, None]
        slow = self._fixed_s(*narrow) + self._sending_s(*narrow, p.power_range)
        slow = slow[:, :, 0] + self._most_s
        low = float(np.where(self._allowed, fast[:, :, 0], np.inf).min(axis=1).max())
        return low, max(float(slow[self._allowed].max()), low * (1 + 1e-6))

    def full_speed(self) -> WeightedPlan:
        """Return the exact cuts at full clock, full power and equal bands."""
        p, count = self._problem, len(self._everyone)
        device, cuts, share = self._all(np.full((count, 1), 1 / count))
        every = device[:, :, 0], cuts[:, :, 0], share[:, :, 0]
        sending = self._sending_s(*every, 1.0)
        side = self._fixed_s(*every) + self._least_s + sending
        joules = self._joules(*every, (self._least_s, sending))
        problem = SplitProblem(
            np.where(self._allowed, side, np.inf),
            self._in_line_s,
            np.zeros_like(side),
            np.asarray(p.device_weight)[:, None] * joules + p.joule_weight * self._other_j,
            p.second_weight,
        )
        cut = split_exactly(problem).cut
        own = self._everyone, cut
        return self._plan(cut, every[2][own], self._least_s[own], sending[own])

    def at(self, seconds: float) -> tuple[float, WeightedPlan | None]:
        """Return a bound on all but delay if the devices' side takes `seconds`, and a plan."""
        values = self._counted(seconds, self._levels).min(axis=1)
        # A share between two levels does no better than the upper, and takes more than the lower.
        bound, _ = self._divide(values, np.pad(self._levels[:, :-1], ((0, 0), (1, 0))))
        _, chosen = self._divide(values, self._levels)
        if chosen is None:
            return bound, None
        share = self._levels[self._everyone, chosen]
        share = share / share.sum()
        cut: Ints = self._counted(seconds, share[:, None])[:, :, 0].argmin(axis=1)
        return bound, self._plan(cut, share, *self._times(seconds, self._everyone, cut, share))

    def _divide(self, values: Array, sizes: Array) -> tuple[float, Ints | None]:
        """Return a bound on the sum of values if sizes add up to 1, and levels that do."""
        smallest = np.isfinite(values).argmax(axis=1)
        possible = np.isfinite(values[self._everyone, smallest]).all()
        if not possible or sizes[self._everyone, smallest].sum() > 1 + 1e-12:
            return np.inf, None

        def answer(price: float) -> tuple[float, Ints, bool]:
            priced = values + price * sizes
            levels: Ints = priced.argmin(axis=1)
            cost = float(priced[self._everyone, levels].sum() - price)
            return cost, levels, bool(sizes[self._everyone, levels].sum() <= 1 + 1e-12)

        bound, chosen, fits = answer(0.0)
        low, high = 0.0, max(float(values[np.isfinite(values)].max()), 1e-300)
        if fits:
            return bound, chosen
        while not answer(high)[2]:
            low, high = high, 8 * high
        for _ in range(_PRICE_STEPS):
            middle = (low + high) / 2
            value, _, fits = answer(middle)
            bound = max(bound, value)
            low, high = (low, middle) if fits else (middle, high)
        return bound, answer(high)[1]

    def _counted(self, seconds: float, share: Array) -> Array:
        """Return what each option counts beside delay, ``[N, C, L]``; infinite if it is late."""
        every = self._all(share)
        fastest = self._fixed_s(*every) + self._sending_s(*every, 1.0) + self._least_s[:, :, None]
        in_time = self._allowed[:, :, None] & (fastest <= seconds * (1 + 1e-12))
        device, cut, given = (item[in_time] for item in every)
        joules = self._joules(device, cut, given, self._times(seconds, device, cut, given))
        result = np.full(in_time.shape, np.inf)
        weight = np.asarray(self._problem.device_weight)[device]
        result[in_time] = weight * joules + self._others[device, cut]
        return result

    def _times(self, seconds: float, device: Ints, cut: Ints, share: Array) -> tuple[Array, Array]:
        """Divide `seconds` between computing and sending for the least energy of the device."""
        every = device, cut, share
        slack = seconds - self._fixed_s(*every)
        quick = self._sending_s(*every, 1.0)
        slow = self._sending_s(*every, self._problem.power_range)
        low = np.clip(slack - slow, self._least_s[device, cut], self._most_s[device, cut])
        high = np.clip(slack - quick, low, self._most_s[device, cut])
        cycles, bits = self._cycles[device, cut], self._bits[device, cut]
        cube = 2 * np.asarray(self._problem.energy_coefficient)[device] * cycles**3
        noise_w, hertz = self._noise_w(device, share), share * self._problem.uplink_hz
        for _ in range(_HALVINGS):
            compute = (low + high) / 2
            nats = bits * np.log(2) / (hertz * np.clip(slack - compute, quick, slow))
            # A second more for computing saves the left side and costs the right one.
            longer = cube > compute**3 * noise_w * (nats * np.exp(nats) - np.expm1(nats))
            low, high = np.where(longer, compute, low), np.where(longer, high, compute)
        compute = (low + high) / 2
        return compute, np.clip(slack - compute, quick, slow)

    def _noise_w(self, device: Ints, share: Array) -> Array:
        """Return the power that a station hears as well as the noise in the share of a device."""
        p = self._problem
        result: Array = (
            np.asarray(p.power_w)[device]
            * share
            * p.uplink_hz
            / np.asarray(p.uplink_snr_hz)[device]
        )
        return result

    def _power_w(self, device: Ints, cut: Ints, share: Array, sending_s: Array) -> Array:
        nats = self._bits[device, cut] * np.log(2) / (share * self._problem.uplink_hz)
        # Nothing to send takes no time and any power.
        nats = np.divide(nats, sending_s, out=np.zeros_like(nats), where=sending_s > 0)
        power: Array = self._noise_w(device, share) * np.expm1(nats)
        return power

    def _joules(self, device: Ints, cut: Ints, share: Array, times: tuple[Array, Array]) -> Array:
        """Return the energy of devices that take so long to compute and to send."""
        compute_s, sending_s = times
        cycles = self._cycles[device, cut]
        clock = np.divide(cycles, compute_s, out=np.zeros_like(cycles), where=compute_s > 0)
        computing = np.asarray(self._problem.energy_coefficient)[device] * clock**2 * cycles
        joules: Array = computing + self._power_w(device, cut, share, sending_s) * sending_s
        return joules

    def _plan(self, cut: Ints, share: Array, compute_s: Array, sending_s: Array) -> WeightedPlan:
        """Return the plan of one option for each device."""
        p, own = self._problem, (self._everyone, cut)
        device_j = self._joules(*own, share, (compute_s, sending_s))
        side_s = self._fixed_s(*own, share) + compute_s + sending_s
        delay_s = float(side_s.max() + self._in_line_s[own].sum())
        other_j = float(self._other_j[own].sum())
        top_hz, top_w = np.asarray(p.clock_hz), np.asarray(p.power_w)
        cycles = self._cycles[own]
        clock = np.divide(cycles, compute_s, out=top_hz.copy(), where=compute_s > 0)
        power = np.where(sending_s > 0, self._power_w(*own, share, sending_s), top_w)
        counted = np.asarray(p.device_weight) @ device_j + p.joule_weight * other_j
        return WeightedPlan(
            cut=cut,
            share=share,
            device_hz=np.minimum(clock, top_hz),
            uplink_w=np.minimum(power, top_w),
            server_hz=self._server_hz,
            device_j=device_j,
            energy_j=float(device_j.sum()) + other_j,
            delay_s=delay_s,
            objective=float(counted) + p.second_weight * delay_s,
            bound=0.0,
        )
