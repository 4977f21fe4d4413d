"""Devices that only infer: servers train as the unsplit model does with those blocks frozen."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fedsplit.strategies.splitfed import SplitFed
from fedsplit.strategies.splitfrozen import SplitFrozen
from fedsplit.strategies.vanilla import Vanilla

from fedsplit.data import training_batches
from fedsplit.errors import PlanError
from fedsplit.flower import RoundOutcome
from fedsplit.flower.node import device as session
from fedsplit.models import load
from fedsplit.plan import DEVICE, CodecPlan, RoundPlan, Route, Segment
from fedsplit.schemes import Scene, Scheme
from fedsplit.seeds import generator
from tests.flower.conftest import N_DEVICES, Federation
from tests.flower.test_strategy import Adapters, assert_equal, initial, weighted_mean

CUT = 2


class Frozen(Scheme):
    """Another scheme's plan, in which devices only infer."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def plan_round(self, scene: Scene) -> RoundPlan:
        work = replace(scene.work, device_adapters=False)
        return self._scheme.plan_round(replace(scene, work=work))


class Waves(Scheme):
    """One branch of three tiers, whose devices train side by side; adapters go over links."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        route = Route.three_tier(scene.n_blocks, CUT, CUT + 1)
        turns = [replace(scene.turn(device, route), edge=0) for device in scene.devices]
        return RoundPlan.hierarchical([turns], rounds=1)


def train_unsplit(
    federation: Federation, device: int, start: Adapters, server_round: int, steps: int
) -> Adapters:
    """Train the whole model in a plain loop, its first blocks frozen: the oracle."""
    job = federation.job
    model, samples = load(job.model), session.named_data(job).train(device)
    whole = Segment(DEVICE, 0, model.n_blocks)
    parameters = model.trainable(whole, start)
    frozen = model.adapter_names(Segment(DEVICE, 0, CUT))
    for name in frozen:
        parameters[name].requires_grad_(False)
    model.install(parameters)
    model.train()
    optimizer = job.optimizer.build([p for p in parameters.values() if p.requires_grad])
    rng = generator(job.seed, "batches", server_round, device)
    for batch in training_batches(samples, job.batch_size, rng, steps):
        optimizer.zero_grad()
        model.run(whole, batch.inputs).loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def up_bytes(outcome: RoundOutcome) -> int:
    return sum(turn.link_bytes["up"] for turn in outcome.turns)


@pytest.mark.parametrize(
    "scheme", [SplitFrozen(cut=CUT), Frozen(SplitFed(cut=CUT)), Frozen(Waves())],
    ids=["splitfrozen", "splitfed", "waves"],
)  # fmt: skip
def test_rounds_are_those_of_the_unsplit_model_with_the_devices_blocks_frozen(
    federation: Federation, scheme: Scheme
) -> None:
    found, outcomes = federation.run(scheme, steps=3, rounds=2)
    adapters = initial(federation)
    for number in (1, 2):
        trained = [
            train_unsplit(federation, device, adapters, number, 3) for device in range(N_DEVICES)
        ]
        adapters = weighted_mean(federation, trained)
    assert_equal(found, adapters)
    assert not any(outcome.failures for outcome in outcomes)


def test_one_branch_is_the_unsplit_model_handed_on(federation: Federation) -> None:
    found, _ = federation.run(Frozen(Vanilla(cut=CUT)), steps=2)
    adapters = initial(federation)
    for device in range(N_DEVICES):
        adapters = train_unsplit(federation, device, adapters, 1, 2)
    assert_equal(found, adapters)


@pytest.mark.parametrize("held_bytes", [1 << 30, 1], ids=["memory", "file"])
def test_a_samples_boundary_is_sent_once(federation: Federation, held_bytes: int) -> None:
    """Whole epochs: after the first, no more than who they are of goes up, and no gradient down."""
    limits = replace(federation.job.limits, held_bytes=held_bytes)
    epochs = Federation(federation.job.model, federation.job.data)
    epochs.job = replace(epochs.job, limits=limits)
    _, always = epochs.run(SplitFed(cut=CUT), steps=None, rounds=1)
    found, once = epochs.run(SplitFrozen(cut=CUT), steps=None, rounds=3)
    adapters = initial(epochs)
    for number in (1, 2, 3):
        sets = []
        for device in range(N_DEVICES):
            steps = len(session.named_data(epochs.job).train(device)) // epochs.job.batch_size
            sets.append(train_unsplit(epochs, device, adapters, number, steps))
        adapters = weighted_mean(epochs, sets)
    assert_equal(found, adapters)
    # An epoch leaves out what does not fill a mini-batch, another time something else.
    assert up_bytes(once[1]) == pytest.approx(up_bytes(always[1]), rel=0.01)
    assert up_bytes(once[2]) < 0.2 * up_bytes(once[1])
    assert up_bytes(once[3]) < 0.2 * up_bytes(once[1])
    down = [turn.link_bytes["down"] for turn in once[1].turns]
    assert sum(down) < 0.1 * sum(turn.link_bytes["down"] for turn in always[1].turns)


def test_what_is_held_is_of_the_same_cut_codec_and_adapters(federation: Federation) -> None:
    class Moving(Scheme):
        def plan_round(self, scene: Scene) -> RoundPlan:
            codec = CodecPlan(uplink={"name": "fp16"}) if scene.server_round == 3 else CodecPlan()
            route = Route.two_tier(scene.n_blocks, 1 if scene.server_round == 2 else CUT)
            turn = scene.turn(0, route)
            return RoundPlan.parallel([replace(turn, frozen=True, codec=codec)])

    _, outcomes = federation.run(Moving(), steps=None, rounds=4)
    sent = [up_bytes(outcome) for outcome in outcomes[1:]]
    assert sent[1] == pytest.approx(sent[0], rel=0.01)
    assert sent[2] == pytest.approx(sent[0] / 2, rel=0.2)
    assert sent[3] == pytest.approx(sent[0], rel=0.01)


@pytest.mark.parametrize(
    "route", [lambda n: Route.u_shaped(n, 1, n - 1), Route.device_only], ids=["u", "alone"]
)
def test_a_route_that_trains_on_the_device_is_refused(
    federation: Federation, route: Callable[[int], Route]
) -> None:
    class Wrong(Scheme):
        def plan_round(self, scene: Scene) -> RoundPlan:
            turn = scene.turn(0, route(scene.n_blocks))
            return RoundPlan.parallel([replace(turn, frozen=True)])

    with pytest.raises(PlanError, match="device 0: route=.*must be one that ends on a server"):
        federation.run(Wrong())


def test_edges_that_are_nodes_hold_nothing(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="must train all its adapters"):
        federation.run(Frozen(Waves()), edge_folder=tmp_path)
