"""What a run spends of its privacy budget, and where it ends."""

import json

import pytest
from fedsplit.apps.spending import Spending

from fedsplit.flower import RoundOutcome, RunEnds
from fedsplit.plan import RoundPlan, Route, Turn
from fedsplit.privacy import PrivacySpec, epsilon

SPEC = PrivacySpec(clip=1.0, noise_multiplier=4.0)
OPEN, U, HOME = Route.two_tier(4, 2), Route.u_shaped(4, 1, 3), Route.device_only(4)


def plan(*routes: Route, steps: int = 4) -> RoundPlan:
    """Return a round in which each device trains over one of `routes`."""
    return RoundPlan.parallel(Turn(i, route, steps) for i, route in enumerate(routes))


def evaluation(*routes: Route) -> RoundOutcome:
    """Return a round's outcome with an evaluation over `routes`."""
    from fedsplit.flower import TurnOutcome

    done = tuple(
        TurnOutcome(Turn(i, route, 1), 1.0, 1, None, 1, 1, {}, 0.0)
        for i, route in enumerate(routes)
    )
    return RoundOutcome(1, plan(*routes), (), 0.0, done)


def spending(spec: PrivacySpec = SPEC, n_train: tuple[int, ...] = (16, 8)) -> Spending:
    found = Spending(spec, batch_size=8)
    found.know(n_train)
    return found


def test_every_use_of_the_most_used_sample_is_counted() -> None:
    spent = spending()
    spent.plan(plan(OPEN, OPEN))  # 4 steps: device 0 has 2 to an epoch, device 1 has 1
    spent.evaluated(evaluation(OPEN, OPEN))
    record = spent.record()
    assert record is not None
    assert (record["trained"], record["evaluated"]) == ((2, 4), 1)
    assert record["epsilon"] == pytest.approx(epsilon(SPEC, 4))
    assert (record["unit"], record["delta"]) == ("sample", 1e-5)


def test_what_never_leaves_a_device_costs_nothing() -> None:
    spent = spending()
    spent.plan(plan(HOME, HOME))
    spent.evaluated(evaluation(HOME, HOME))
    assert spent.record()["epsilon"] == 0  # type: ignore[index]


def test_gradients_of_a_u_shaped_route_count_where_they_are_noised() -> None:
    spec = PrivacySpec(
        clip=1.0, noise_multiplier=4.0, gradient_clip=1.0, gradient_noise_multiplier=2.0
    )
    spent = spending(spec)
    spent.plan(plan(U, U))
    assert spent.record()["epsilon"] == pytest.approx(epsilon(spec, 4, 4))  # type: ignore[index]


def test_a_run_goes_on_from_what_its_last_record_says() -> None:
    first = spending()
    first.plan(plan(OPEN, OPEN))
    again = Spending(SPEC, 8, json.loads(json.dumps(first.record())))
    again.know((16, 8))
    again.plan(plan(OPEN, OPEN))
    assert again.record()["epsilon"] == pytest.approx(epsilon(SPEC, 8))  # type: ignore[index]


def test_a_run_ends_before_the_round_that_would_overspend_and_counts_nothing_of_it() -> None:
    limit = epsilon(SPEC, 9)
    spent = spending(PrivacySpec(clip=1.0, noise_multiplier=4.0, budget=limit))
    spent.plan(plan(OPEN, OPEN))
    spent.plan(plan(OPEN, OPEN))
    before = spent.record()
    with pytest.raises(RunEnds, match=r"epsilon would be .*, above privacy.budget="):
        spent.plan(plan(OPEN, OPEN))
    assert spent.record() == before


def test_without_noise_nothing_is_reported() -> None:
    assert spending(PrivacySpec()).record() is None
    assert spending(PrivacySpec(clip=1.0)).record() is None
