"""On each paper's own objective, planning jointly gains, or a bound says that nothing can."""

import pytest

from benchmarks._joint import OBJECTIVES


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_joint_planning_gains_or_a_bound_says_why_not(objective: str) -> None:
    found = OBJECTIVES[objective](0)
    assert found.bound <= found.ours * (1 + 1e-9)
    assert found.ours <= found.own * (1 + 1e-9)
    nothing_to_gain = found.bound >= found.own * (1 - 1e-3)
    assert nothing_to_gain or found.ours < found.own
