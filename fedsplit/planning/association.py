"""Which edge serves which user, and which users train in a round (SplitLLM).

In every round one user of each edge trains (arXiv 2501.13318; papers' section 1). How users are
associated and chosen is open in the paper; these are the project's rules.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import coo_array, csr_array, hstack
from scipy.sparse.csgraph import maximum_bipartite_matching

from fedsplit.arrays import Array
from fedsplit.errors import require, require_choice
from fedsplit.planning.errors import InfeasibleError, checked
from fedsplit.seeds import generator

Ints = NDArray[np.int64]
RULES = ("round_robin", "random")


@dataclass(frozen=True, eq=False)
class Association:
    """An edge for every user.

    Parameters
    ----------
    edge : ndarray of int
        Edge of each user, shape ``[N]``.
    objective_s : float
        What was minimised, as reached: total time or the busiest edge's.
    bound_s : float
        No association that is allowed does better.
    """

    edge: Ints
    objective_s: float
    bound_s: float


def associate_by_channel(times_s: ArrayLike, capacity: int | None = None) -> Association:
    """Give users the edges that serve them fastest in total, with at most `capacity` users each.

    Exact (assignment problem). With the default capacity every user trains once in ``ceil(N / K)``
    rounds.

    Parameters
    ----------
    times_s : array_like
        Time of a turn of each user at each edge, s, shape ``[N, K]``; infinite out of reach.
    capacity : int, optional
        Most users of an edge, ``ceil(N / K)`` by default.

    Raises
    ------
    InfeasibleError
        If the edges cannot take all users.
    FedsplitError
        If a time is NaN or negative.
    """
    times = _checked_times(times_s)
    n_users, n_edges = times.shape
    room = -(-n_users // n_edges) if capacity is None else capacity
    require(room >= 1, "capacity", room, "at least 1")
    if room * n_edges < n_users:
        raise InfeasibleError("room at the edges", n_users, room * n_edges, "users")
    slots = np.repeat(times, room, axis=1)
    served = maximum_bipartite_matching(csr_array(np.isfinite(slots)), perm_type="column") >= 0
    if not served.all():
        raise InfeasibleError("room at the edges in reach", n_users, served.sum(), "users")
    user, slot = linear_sum_assignment(slots)
    edge = np.empty(n_users, dtype=np.int64)
    edge[user] = slot // room
    total = float(times[np.arange(n_users), edge].sum())
    return Association(edge, total, total)


def associate_by_load(times_s: ArrayLike) -> Association:
    """Balance the edges: keep the busiest edge's total time small.

    Scheduling on unrelated machines: the linear relaxation, which is the bound, leaves at most K
    users split between edges; those go where they end first. From there and from everyone's fastest
    edge, users move and swap while that relieves the busiest edge.

    `times_s` and errors as in `associate_by_channel`.
    """
    times = _checked_times(times_s)
    n_users, n_edges = times.shape
    user, choice = np.nonzero(np.isfinite(times))
    seconds, pairs = times[user, choice], np.arange(len(user))
    in_time = coo_array((seconds, (choice, pairs)), (n_edges, len(pairs)))
    once = coo_array((np.ones(len(pairs)), (user, pairs)), (n_users, len(pairs)))
    solution = linprog(
        np.append(np.zeros(len(pairs)), 1.0),
        A_ub=hstack([in_time, -np.ones((n_edges, 1))]),
        b_ub=np.zeros(n_edges),
        A_eq=hstack([once, np.zeros((n_users, 1))]),
        b_eq=np.ones(n_users),
        method="highs-ds",
    )
    require(solution.status == 0, "associate_by_load", solution.message, "a problem HiGHS solves")
    bound = max(float(solution.fun), float(times.min(axis=1).max()))
    part = np.zeros_like(times)
    part[user, choice] = solution.x[:-1]
    rounded: Ints = part.argmax(axis=1)
    split = np.flatnonzero(part.max(axis=1) < 1 - 1e-9)
    load = _loads(times, rounded)
    np.subtract.at(load, rounded[split], times[split, rounded[split]])
    for one in split[np.argsort(-times[split].min(axis=1), kind="stable")]:
        rounded[one] = int((load + times[one]).argmin())
        load[rounded[one]] += times[one, rounded[one]]
    starts = (rounded, times.argmin(axis=1))
    edge = min((_improve(times, start) for start in starts), key=lambda e: _loads(times, e).max())
    longest = float(_loads(times, edge).max())
    return Association(edge, longest, min(bound, longest))


def select_users(
    home: ArrayLike, round_: int, seed: int, rule: str = "round_robin", count: int | None = 1
) -> NDArray[np.int64]:
    """Return the users that train in a round: some of each edge that has any.

    Parameters
    ----------
    home : array_like of int
        Edge of each user, shape ``[N]``.
    round_ : int
        The round, from 0.
    seed : int
        Root of the draws.
    rule : str
        "round_robin": an edge's users take turns in an order drawn anew for every pass, nobody
        twice before all others. "random": each round draws afresh.
    count : int or None
        Users of each edge, fewer where it has no more (left in the pass); None for all.

    Returns
    -------
    ndarray of int
        Users by rising edge.

    Raises
    ------
    FedsplitError
        If the round is negative, the rule unknown or the count not positive.
    """
    require(round_ >= 0, "round", round_, "at least 0")
    require(count is None or count >= 1, "count", count, "at least 1, or None")
    require_choice("rule", rule, RULES)
    edges = np.asarray(home)
    chosen: list[Ints] = []
    for edge in np.unique(edges):
        users = np.flatnonzero(edges == edge)
        some = len(users) if count is None else min(count, len(users))
        if rule == "random":
            rng = generator(seed, "user selection", int(edge), "round", round_)
            chosen.append(rng.choice(users, some, replace=False))
        else:
            turn, position = divmod(round_, -(-len(users) // some))
            rng = generator(seed, "user selection", int(edge), "pass", turn)
            chosen.append(rng.permutation(users)[position * some : (position + 1) * some])
    return np.concatenate(chosen)


def _checked_times(times_s: ArrayLike) -> Array:
    times = checked("times_s", times_s, infinite=True)
    require(times.ndim == 2 and times.size > 0, "times_s shape", times.shape, "(users, edges)")
    deaf = np.flatnonzero(np.isinf(times).all(axis=1))
    if len(deaf):
        raise InfeasibleError(f"edges in reach of user {deaf[0]}", 1, 0, "edges")
    return times


def _loads(times: Array, edge: Ints) -> Array:
    load: Array = np.zeros(times.shape[1])
    np.add.at(load, edge, times[np.arange(len(edge)), edge])
    return load


def _improve(times: Array, edge: Ints) -> Ints:
    """Relieve the busiest edge by moving a user or swapping two, for as long as that helps."""
    edge, load = edge.copy(), _loads(times, edge)
    everyone = np.arange(len(edge))
    own = times[everyone, edge]
    while True:
        busiest = int(load.argmax())
        mine, others = np.flatnonzero(edge == busiest), np.flatnonzero(edge != busiest)
        moved = load + times[mine]
        moved[:, busiest] = np.inf
        move = np.unravel_index(moved.argmin(), moved.shape)
        best = float(moved[move])
        change = [(int(mine[move[0]]), int(move[1]))]
        if len(others):
            there = load[edge[others]] - own[others] + times[np.ix_(mine, edge[others])]
            here = load[busiest] - own[mine][:, None] + times[others, busiest]
            swapped = np.maximum(there, here)
            swap = np.unravel_index(swapped.argmin(), swapped.shape)
            if swapped[swap] < best:
                one, other = int(mine[swap[0]]), int(others[swap[1]])
                best, change = float(swapped[swap]), [(one, int(edge[other])), (other, busiest)]
        if not best < load[busiest] * (1 - 1e-12):
            return edge
        for user, target in change:
            edge[user] = target
            own[user] = times[user, target]
        load = _loads(times, edge)
