"""Exact cuts of all devices: nothing is better, whatever was tried."""

from itertools import product

import numpy as np
import pytest

from fedsplit.errors import FedsplitError
from fedsplit.planning import InfeasibleError, SplitProblem, split_exactly
from fedsplit.seeds import generator


def random_problem(seed: int) -> SplitProblem:
    """Return a small round; every third has few different values, hence ties."""
    rng = generator(seed, "exact")
    shape = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    draw = (
        (lambda: rng.integers(0, 4, shape) / 2.0) if seed % 3 == 0 else (lambda: rng.random(shape))
    )
    ahead, server, behind, energy = draw(), 0.3 * draw(), draw(), draw()
    ahead[rng.random(shape) < 0.15] = np.inf
    ahead[:, 0] = np.where(np.isfinite(ahead).any(axis=1), ahead[:, 0], 1.0)
    weight = float(rng.choice([0.0, 0.1, 1.0, 10.0, np.inf]))
    return SplitProblem(ahead, server, behind, energy, weight)


def brute_force(problem: SplitProblem) -> float:
    n_devices, n_cuts = np.shape(problem.ahead_s)
    return min(
        cost
        for cut in product(range(n_cuts), repeat=n_devices)
        if not np.isnan(cost := problem.objective(cut))
    )


def test_nothing_is_better_in_600_rounds() -> None:
    wrong = []
    for seed in range(600):
        problem = random_problem(seed)
        found = split_exactly(problem)
        if found.objective != pytest.approx(brute_force(problem), rel=1e-12, abs=1e-12):
            wrong.append(seed)
        assert found.bound == pytest.approx(found.objective, rel=1e-12, abs=1e-12)
        assert np.isfinite(found.delay_s)
    assert wrong == []


def test_each_device_alone_can_be_far_from_the_best() -> None:
    """Device 0 takes 10 s ahead wherever it is cut: the other may as well save energy for 9 s."""
    problem = SplitProblem(
        ahead_s=[[10.0, 10.0], [1.0, 9.0]],
        server_s=np.zeros((2, 2)),
        behind_s=np.zeros((2, 2)),
        energy_j=[[1.0, 1.0], [5.0, 0.0]],
        delay_weight=1.0,
    )
    found = split_exactly(problem)
    assert found.cut[1] == 1
    assert (found.delay_s, found.energy_j, found.objective) == (10.0, 1.0, 11.0)


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_the_objective_is_joules_and_seconds_of_delay_alone(weight: float) -> None:
    """In J: E and so many watts times T; in s where nothing but delay counts."""
    parts = [[2.0]], [[3.0]], [[5.0]], [[7.0]]
    assert split_exactly(SplitProblem(*parts, weight)).objective == 7.0 + weight * 10.0
    assert split_exactly(SplitProblem(*parts, np.inf)).objective == 10.0


def test_a_server_that_serves_one_after_the_other_counts_the_sum() -> None:
    problem = SplitProblem(
        [[1.0, 3.0]] * 3, [[2.0, 0.5]] * 3, np.ones((3, 2)), np.zeros((3, 2)), np.inf
    )
    found = split_exactly(problem)
    assert found.cut.tolist() == [1, 1, 1]
    assert found.delay_s == 3 + 3 * 0.5 + 1


def test_energy_alone_takes_each_device_s_least() -> None:
    problem = random_problem(7)
    problem = SplitProblem(
        problem.ahead_s, problem.server_s, problem.behind_s, problem.energy_j, 0.0
    )
    possible = np.where(np.isfinite(problem.ahead_s), problem.energy_j, np.inf)
    assert split_exactly(problem).objective == pytest.approx(possible.min(axis=1).sum())


def test_a_device_without_a_cut_is_named() -> None:
    ahead = [[1.0], [np.inf]]
    rest = np.ones((2, 1))
    with pytest.raises(InfeasibleError, match="device 1"):
        SplitProblem(ahead, rest, rest, rest, 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("server_s", [[-1.0]]),
        ("energy_j", [[np.nan]]),
        ("behind_s", [[np.inf]]),
        ("ahead_s", [1.0]),
        ("delay_weight", -1.0),
        ("delay_weight", np.nan),
    ],
)
def test_what_makes_no_sense_is_refused(field: str, value: object) -> None:
    good = {name: [[1.0]] for name in ("ahead_s", "server_s", "behind_s", "energy_j")}
    with pytest.raises(FedsplitError, match=field):
        SplitProblem(**(good | {"delay_weight": 1.0} | {field: value}))
