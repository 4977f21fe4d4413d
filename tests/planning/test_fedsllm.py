"""FedsLLM's accuracy and bands equal a conic solver's, and no other accuracy is faster."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.planning.errors import InfeasibleError
from fedsplit.planning.fedsllm import FedsllmProblem, LearningCurve, plan_fedsllm
from tests.planning.planning_scenarios import conic_longest_s

# The parent paper's constants, as papers' section 3 (d) lists them.
THEORY = LearningCurve.from_constants(1.0, 1.0, 0.1, 0.1, 1e-3)


def _problem(n_clients: int, seed: int, **changes) -> FedsllmProblem:
    rng = np.random.default_rng(seed)
    distance_km = np.maximum(np.hypot(*rng.uniform(-0.25, 0.25, (2, n_clients))), 0.01)
    loss_db = 128.1 + 37.6 * np.log10(distance_km) + 8 * rng.normal(size=(2, n_clients))
    snr_hz = 0.01 * 10 ** (-loss_db / 10) / 10**-20.4
    values = {
        "device_s": 0.2 * rng.uniform(1, 3, n_clients) * 1e4 * 500 / 2e9,
        "smashed_bits": 28.1e3,
        "adapter_bits": 28.1e3,
        "main_snr_hz": snr_hz[0],
        "fed_snr_hz": snr_hz[1],
        "main_hz": 20e6,
        "fed_hz": 15e6,
        "learning": THEORY,
    }
    return FedsllmProblem(**{**values, **changes})


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.parametrize("smashed_per", ["round", "iteration"])
@pytest.mark.parametrize("n_clients", [1, 6, 25])
def test_the_plan_equals_a_conic_solver_and_no_accuracy_beats_it(
    n_clients: int, smashed_per: str
) -> None:
    problem = _problem(n_clients, seed=n_clients, smashed_per=smashed_per)
    plan = plan_fedsllm(problem)
    expected = conic_longest_s(*problem.round_at(plan.accuracy))
    assert plan.round_s == pytest.approx(expected, rel=1e-6)
    assert plan.total_s == pytest.approx(expected * THEORY.rounds / (1 - plan.accuracy), rel=1e-6)
    assert plan.allocation_gap <= 1e-10
    for accuracy in [*np.geomspace(1e-4, 0.9, 40), plan.accuracy * 0.999, plan.accuracy * 1.001]:
        assert plan_fedsllm(problem, accuracy).total_s >= plan.total_s * (1 - 1e-9)


@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(0, 2**32))
def test_the_plan_is_feasible_and_beats_the_unoptimised_schemes(n_clients: int, seed: int) -> None:
    problem = _problem(n_clients, seed)
    plan = plan_fedsllm(problem)
    assert plan.main_hz.sum() <= problem.main_hz * (1 + 1e-12)
    assert plan.fed_hz.sum() <= problem.fed_hz * (1 + 1e-12)
    pools, compute = problem.round_at(plan.accuracy)
    sent = pools[0].delay_s(plan.main_hz) + pools[1].delay_s(plan.fed_hz)
    assert (compute + sent).max() == pytest.approx(plan.round_s)
    assert plan.total_s == pytest.approx(plan.rounds * plan.round_s)
    equal = plan_fedsllm(problem, equal_bandwidth=True)
    for worse in (equal, plan_fedsllm(problem, 0.5), plan_fedsllm(problem, 0.1)):
        assert plan.total_s <= worse.total_s * (1 + 1e-9)
    assert equal.total_s <= plan_fedsllm(problem, 0.1, equal_bandwidth=True).total_s * (1 + 1e-9)


def test_theory_constants_give_the_curve_of_the_proof() -> None:
    assert THEORY.iterations == pytest.approx(2 / (1.9 * 0.1))
    assert THEORY.rounds == pytest.approx(20 * np.log(1000))
    assert THEORY.local_iterations(0.25) == pytest.approx(2 * THEORY.iterations)
    assert THEORY.global_rounds(0.5) == pytest.approx(2 * THEORY.rounds)


def test_server_compute_and_smashed_data_per_iteration_only_add_delay() -> None:
    total = plan_fedsllm(_problem(10, 0)).total_s
    assert plan_fedsllm(_problem(10, 0, server_s=0.01)).total_s > total
    assert plan_fedsllm(_problem(10, 0, smashed_per="iteration")).total_s > total


def test_infeasible_and_bad_input_is_refused() -> None:
    with pytest.raises(InfeasibleError, match="federated band: budget is 0"):
        _problem(3, 0, fed_hz=0.0)
    with pytest.raises(InfeasibleError, match="main band: user 1 has no channel gain"):
        _problem(3, 0, main_snr_hz=np.array([1e7, 0.0, 1e7]))
    with pytest.raises(FedsplitError, match=r"device_s\[0\]"):
        _problem(3, 0, device_s=np.nan)
    with pytest.raises(FedsplitError, match="smashed_per"):
        _problem(3, 0, smashed_per="epoch")
    with pytest.raises(FedsplitError, match=r"accuracy=1\.0"):
        plan_fedsllm(_problem(3, 0), 1.0)
    with pytest.raises(FedsplitError, match="target"):
        LearningCurve.from_constants(1, 1, 0.1, 0.1, 2.0)
