"""Grouping of devices for GSFL: groups run in parallel, the devices of a group in turn.

A round lasts as long as its slowest group (arXiv 2305.18889; papers' section 6), so groups are
balanced by the time that their devices take: scheduling on identical machines.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fedsplit.arrays import Array
from fedsplit.errors import require
from fedsplit.planning.errors import checked

# Branch and bound takes well under a second up to here.
MAX_EXACT_DEVICES = 14


@dataclass(frozen=True)
class Grouping:
    """Groups of devices.

    Parameters
    ----------
    groups : tuple of tuple of int
        Devices of each group, in rising order.
    makespan_s : float
        Time of the slowest group.
    bound_s : float
        No grouping is faster.
    """

    groups: tuple[tuple[int, ...], ...]
    makespan_s: float
    bound_s: float


def balanced_groups(times_s: ArrayLike, n_groups: int) -> Grouping:
    """Put the slowest device left over in the group that is least busy (LPT).

    At most ``4/3 - 1/(3 M)`` times as slow as the best grouping in M groups (Graham 1969).

    Parameters
    ----------
    times_s : array_like
        Time of each device's turn, s, shape ``[N]``.
    n_groups : int
        Number of groups, 1 to N; none stays empty.

    Raises
    ------
    FedsplitError
        If a time is NaN, negative or infinite, or the number of groups is out of range.
    """
    times = _checked_times(times_s, n_groups)
    members: list[list[int]] = [[] for _ in range(n_groups)]
    load = np.zeros(n_groups)
    for device in np.argsort(-times, kind="stable"):
        group = min(range(n_groups), key=lambda m: (load[m], len(members[m])))
        members[group].append(int(device))
        load[group] += times[device]
    return _grouping(members, times)


def exact_groups(times_s: ArrayLike, n_groups: int) -> Grouping:
    """Return the best grouping of a few devices, by branch and bound from `balanced_groups`.

    Parameters and errors as in `balanced_groups`; at most `MAX_EXACT_DEVICES` devices.
    """
    times = _checked_times(times_s, n_groups)
    require(len(times) <= MAX_EXACT_DEVICES, "devices", len(times), f"<= {MAX_EXACT_DEVICES}")
    best = balanced_groups(times, n_groups)
    order = np.argsort(-times, kind="stable")
    members: list[list[int]] = [[] for _ in range(n_groups)]
    load = [0.0] * n_groups

    def place(position: int) -> None:
        nonlocal best
        if best.makespan_s <= best.bound_s:
            return
        if position == len(order):
            best = _grouping(members, times)
            return
        device = int(order[position])
        tried = set()
        for group in range(n_groups):
            # Groups with the same load are interchangeable.
            if load[group] in tried or load[group] + times[device] >= best.makespan_s:
                continue
            tried.add(load[group])
            before = load[group]
            members[group].append(device)
            load[group] = before + float(times[device])
            place(position + 1)
            members[group].pop()
            load[group] = before

    place(0)
    return best


def random_groups(times_s: ArrayLike, n_groups: int, rng: np.random.Generator) -> Grouping:
    """Return a random grouping into groups of equal size, give or take one.

    Parameters and errors as in `balanced_groups`.
    """
    times = _checked_times(times_s, n_groups)
    order = rng.permutation(len(times))
    return _grouping([order[group::n_groups].tolist() for group in range(n_groups)], times)


def _checked_times(times_s: ArrayLike, n_groups: int) -> Array:
    times = checked("times_s", np.atleast_1d(times_s))
    require(1 <= n_groups <= len(times), "n_groups", n_groups, f"1 to {len(times)}")
    return times


def _grouping(members: list[list[int]], times: Array) -> Grouping:
    n_groups = len(members)
    slowest = np.sort(times)[::-1]
    bound = max(float(times.sum()) / n_groups, float(slowest[0]))
    if len(times) > n_groups:
        # Two of the M + 1 slowest devices share a group.
        bound = max(bound, float(slowest[n_groups - 1] + slowest[n_groups]))
    makespan = max(float(times[group].sum()) for group in members)
    return Grouping(
        tuple(tuple(sorted(group)) for group in members), makespan, min(bound, makespan)
    )
