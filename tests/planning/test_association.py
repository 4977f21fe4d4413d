"""Users are spread over edges as enumeration would, and each takes its turn."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.planning.association import (
    associate_by_channel,
    associate_by_load,
    select_users,
)
from fedsplit.planning.errors import InfeasibleError


def _times(n_users: int, n_edges: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(1, 3, (n_users, 1)) + rng.exponential(2.0, (n_users, n_edges))


def _choices(n_users: int, n_edges: int) -> np.ndarray:
    return np.array(list(product(range(n_edges), repeat=n_users)))


def _loads(times: np.ndarray, edge: np.ndarray) -> np.ndarray:
    return np.bincount(edge, times[np.arange(len(edge)), edge], minlength=times.shape[1])


@pytest.mark.parametrize("seed", range(10))
def test_by_channel_equals_enumeration(seed: int) -> None:
    times = _times(6, 3, seed)
    choices = _choices(6, 3)
    fits = (np.apply_along_axis(np.bincount, 1, choices, minlength=3) <= 2).all(axis=1)
    best = times[np.arange(6), choices[fits]].sum(axis=1).min()
    found = associate_by_channel(times)
    assert found.objective_s == pytest.approx(best)
    assert np.bincount(found.edge).max() <= 2
    assert times[np.arange(6), found.edge].sum() == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_by_load_is_near_enumeration_and_its_bound_holds(seed: int) -> None:
    times = _times(6, 3, seed)
    best = min(_loads(times, choice).max() for choice in _choices(6, 3))
    found = associate_by_load(times)
    assert found.bound_s <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found.objective_s <= best * 1.15
    assert _loads(times, found.edge).max() == pytest.approx(found.objective_s, rel=1e-12)


def test_by_load_nears_its_bound_with_many_users() -> None:
    found = associate_by_load(_times(200, 5, 0))
    assert found.objective_s <= found.bound_s * 1.01


@settings(max_examples=20)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32))
def test_users_only_go_where_they_reach(n_users: int, n_edges: int, seed: int) -> None:
    times = _times(n_users, n_edges, seed)
    near = np.random.default_rng(seed).integers(n_edges, size=n_users)
    far = np.random.default_rng(seed + 1).random(times.shape) < 0.5
    far[np.arange(n_users), near] = False
    times[far] = np.inf
    for found in (associate_by_load(times), associate_by_channel(times, capacity=n_users)):
        assert not far[np.arange(n_users), found.edge].any()


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=15), st.integers(0, 2**40))
def test_round_robin_serves_everyone_once_in_every_pass(home: list[int], seed: int) -> None:
    for edge in set(home):
        users = [user for user, where in enumerate(home) if where == edge]
        for first in (0, 3 * len(users)):
            served = [
                user
                for round_ in range(first, first + len(users))
                for user in select_users(home, round_, seed)
                if home[user] == edge
            ]
            assert sorted(served) == users


@pytest.mark.parametrize("rule", ["round_robin", "random"])
def test_a_round_takes_one_user_of_each_edge(rule: str) -> None:
    home = [2, 0, 2, 5, 0, 2]
    for round_ in range(10):
        users = select_users(home, round_, 1, rule)
        assert [home[user] for user in users] == [0, 2, 5]
        assert (users == select_users(home, round_, 1, rule)).all()


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=15), st.integers(1, 5), st.integers(0, 2**40)
)
def test_several_users_of_an_edge_take_turns_too(home: list[int], count: int, seed: int) -> None:
    for edge in set(home):
        users = [user for user, where in enumerate(home) if where == edge]
        rounds = -(-len(users) // count)
        served = [
            [u for u in select_users(home, round_, seed, count=count) if home[u] == edge]
            for round_ in range(rounds)
        ]
        assert sorted(user for some in served for user in some) == users
        assert all(len(some) == min(count, len(users)) for some in served[:-1])
    for rule in ("round_robin", "random"):
        drawn = select_users(home, 3, seed, rule, count)
        assert len(set(drawn)) == len(drawn)
        assert sorted(select_users(home, 3, seed, rule, None)) == list(range(len(home)))


def test_random_selection_varies() -> None:
    rounds = {tuple(select_users([0] * 8, round_, 1, "random")) for round_ in range(40)}
    assert len(rounds) > 4


def test_infeasible_and_bad_input_is_refused() -> None:
    with pytest.raises(InfeasibleError, match=r"room at the edges: needs 5 users, has 4"):
        associate_by_channel(_times(5, 2, 0), capacity=2)
    times = _times(4, 2, 0)
    times[:3, 1] = np.inf
    with pytest.raises(InfeasibleError, match=r"edges in reach: needs 4 users, has 3"):
        associate_by_channel(times)
    times[1] = np.inf
    for associate in (associate_by_channel, associate_by_load):
        with pytest.raises(InfeasibleError, match="in reach of user 1"):
            associate(times)
        with pytest.raises(FedsplitError, match=r"times_s\[0, 1\]"):
            associate([[1.0, np.nan]])
    with pytest.raises(FedsplitError, match="rule"):
        select_users([0], 0, 0, "best")
    with pytest.raises(FedsplitError, match="round"):
        select_users([0], -1, 0)
    with pytest.raises(FedsplitError, match="count=0: must be at least 1, or None"):
        select_users([0], 0, 0, count=0)
