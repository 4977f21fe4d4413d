"""A run with a whole recipe is one loop over the unsplit model, wherever its parts are held."""

from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
from fedsplit.strategies.vanilla import Vanilla
from flwr.serverapp.strategy import Strategy

from fedsplit.data import training_batches
from fedsplit.errors import SettingsError
from fedsplit.execution import OptimizerSpec, train_turn
from fedsplit.flower.node import device as session
from fedsplit.models import load
from fedsplit.plan import Branch, RoundPlan, Route
from fedsplit.schemes import Scene, Scheme
from fedsplit.seeds import generator
from tests.flower.conftest import Federation
from tests.flower.test_strategy import assert_equal, initial

ROUNDS, TURNS, STEPS = 2, 2, 3  # an update of two mini-batches, and one of what is left
RECIPE: dict[str, Any] = {"schedule": "cosine", "warmup": 2, "clip": 0.05, "accumulate": 2}
ROUTES = {
    "two tiers": Route.two_tier(4, 1),
    "three tiers": Route.three_tier(4, 1, 3),
    "U shape": Route.u_shaped(4, 1, 3),
    "alone": Route.device_only(4),
}


class OneDevice(Scheme):
    """Device 0 alone, twice a round."""

    def __init__(self, route: Route) -> None:
        self.route = route

    def plan_round(self, scene: Scene) -> RoundPlan:
        turn = scene.turn(0, self.route)
        edge = 0 if "edge" in str(self.route) else None
        turns = [replace(turn, edge=edge, repeat=number) for number in range(TURNS)]
        return RoundPlan((Branch(tuple(turns)),))


def one_loop(federation: Federation, spec: OptimizerSpec) -> dict[str, Any]:
    """Return what the unsplit model learns from the same mini-batches, turn after turn."""
    job, model, kept = federation.job, load(federation.job.model), {}
    samples, adapters = session.named_data(job).train(0), initial(federation)
    places = [(number, repeat) for number in range(ROUNDS) for repeat in range(TURNS)]
    for place, (number, repeat) in enumerate(places):
        since = [] if spec.keep_order else [number + 1]
        rng = generator(job.seed, "batches", *since, 0, *([repeat] if repeat else []))
        # As one long training, of which a turn is the next part.
        so_far = STEPS * number if spec.keep_order else 0
        steps = training_batches(samples, job.batch_size, rng, so_far + STEPS)
        result = train_turn(
            model,
            ROUTES["alone"],
            islice(steps, so_far, None),
            adapters=adapters,
            optimizer=replace(spec, part=(place, len(places))),
            seed=0,
            steps=STEPS,
            kept=kept,
        )
        adapters, kept = result.adapters, result.state
    return adapters


@pytest.fixture(scope="module")
def recipe(federation: Federation) -> Any:
    """Return a federation that trains by a recipe, and what comes of it unsplit."""
    found = Federation(federation.job.model, federation.job.data)

    def of(**changes: Any) -> tuple[Federation, dict[str, Any]]:
        spec = replace(federation.job.optimizer, **RECIPE, **changes)
        found.job = replace(federation.job, optimizer=spec)
        return found, one_loop(found, spec)

    return of


@pytest.mark.parametrize("name", ROUTES)
def test_moments_and_rates_go_on_over_the_run_on_every_route(
    recipe: Any, fedavg: Strategy, name: str
) -> None:
    federation, expected = recipe(keep_state=True)
    found, outcomes = federation.run(
        OneDevice(ROUTES[name]), fedavg, rounds=ROUNDS, steps=STEPS, evaluate_every=ROUNDS
    )
    assert not list(chain.from_iterable(outcome.failures for outcome in outcomes))
    assert_equal(found, expected)
    _, forgetful = recipe(keep_state=False)
    assert max(float((forgetful[key] - expected[key]).abs().max()) for key in expected) > 1e-5


def test_the_order_of_samples_goes_on_over_the_run(recipe: Any, fedavg: Strategy) -> None:
    federation, expected = recipe(keep_state=True, keep_order=True)
    route = OneDevice(ROUTES["two tiers"])
    found, _ = federation.run(route, fedavg, rounds=ROUNDS, steps=STEPS, evaluate_every=ROUNDS)
    assert_equal(found, expected)
    _, afresh = recipe(keep_state=True)
    assert max(float((afresh[key] - expected[key]).abs().max()) for key in expected) > 1e-5


def test_at_an_edge_that_is_a_node_the_rates_are_those_of_the_plan(
    recipe: Any, fedavg: Strategy, tmp_path: Path
) -> None:
    federation, expected = recipe()
    found, outcomes = federation.run(
        OneDevice(ROUTES["three tiers"]),
        fedavg,
        rounds=ROUNDS,
        steps=STEPS,
        edge_folder=tmp_path,
        evaluate_every=ROUNDS,
    )
    assert not list(chain.from_iterable(outcome.failures for outcome in outcomes))
    assert_equal(found, expected, tolerance=1e-5)  # fresh moments magnify what was rounded


def test_devices_started_ahead_train_at_the_rates_of_their_own_waves(
    recipe: Any, fedavg: Strategy
) -> None:
    federation, _ = recipe()
    runs = [
        federation.run(Vanilla(cut=1), fedavg, steps=STEPS, start_ahead=ahead)[0]
        for ahead in (False, True)
    ]
    assert_equal(*runs, tolerance=0)


class Moving(OneDevice):
    """Another cut in every round."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        route = Route.two_tier(scene.n_blocks, (3, 1, 3)[scene.server_round - 1])
        return RoundPlan.parallel([scene.turn(0, route)])


def test_who_takes_over_a_parameter_begins_it_afresh_and_nobody_finds_old_moments(
    recipe: Any, fedavg: Strategy
) -> None:
    federation, _ = recipe(keep_state=True)
    seen = []
    write = session.write_state

    def look(context: Any, state: Any) -> None:
        seen.append({name: float(one["step"]) for name, one in state.items()})
        write(context, state)

    session.write_state = look
    try:
        federation.run(Moving(ROUTES["alone"]), fedavg, rounds=3, steps=2, evaluate_every=3)
    finally:
        session.write_state = write
    # One update a round: blocks 1 and 2 were away in the second.
    first, _, last = seen
    away = {name for name in first if ".1." in name or ".2." in name}
    assert away
    assert {name: last[name] for name in last} == {
        name: 1.0 if name in away else 3.0 for name in first
    }


def test_edges_that_are_nodes_keep_no_moments(federation: Federation, tmp_path: Path) -> None:
    spec = replace(federation.job.optimizer, keep_state=True)
    keeping = Federation(federation.job.model, federation.job.data)
    keeping.job = replace(federation.job, optimizer=spec)
    with pytest.raises(SettingsError, match="train.keep_state=True: must be false where edge"):
        keeping.run(OneDevice(ROUTES["three tiers"]), edge_folder=tmp_path)
