"""Codecs that go on over turns: exact, cheap, in step, and apart for each device."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp.strategy import Strategy

from fedsplit.codec import Remembered
from fedsplit.errors import PlanError
from fedsplit.flower import RoundOutcome
from fedsplit.flower.node import device as node
from fedsplit.plan import CodecPlan, RoundPlan, Route
from fedsplit.schemes import Scene, Scheme
from tests.flower.conftest import Federation
from tests.flower.test_strategy import assert_equal

EXACT = {"name": "identity"}
LASTING: dict[str, Any] = {
    "name": "temporal", "key": EXACT, "residual": EXACT, "key_every": 1000, "over_turns": True
}  # fmt: skip
FEEDBACK: dict[str, Any] = {
    "name": "error_feedback", "inner": {"name": "topk", "keep": 0.2}, "over_turns": True
}  # fmt: skip
OPEN, HOME = Route.two_tier(4, 1), Route.u_shaped(4, 1, 3)


class Coded(Scheme):
    """Two devices side by side, whole epochs, over `route` with codecs `up` and `down`."""

    def __init__(self, route: Route, up: dict[str, Any], down: dict[str, Any]) -> None:
        self.route, self.codec = route, CodecPlan(up, down)

    def plan_round(self, scene: Scene) -> RoundPlan:
        turns = [replace(scene.turn(d, self.route), codec=self.codec) for d in (0, 1)]
        return RoundPlan.parallel(turns)


@pytest.fixture(scope="module")
def few(federation: Federation) -> Federation:
    """Return a federation of few samples."""
    return Federation(federation.job.model, replace(federation.job.data, max_samples=24))


@pytest.fixture(scope="module")
def unequal(few: Federation, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Return one whose samples are of other lengths, each mini-batch as long as its longest."""
    path = tmp_path_factory.mktemp("unequal") / "pairs.jsonl"
    words = ["the", "quick", "brown", "fox", "and", "the", "lazy", "dog"]
    rows = [{"a": " ".join(words[n % 3 :]), "b": " ".join(words[: n % 6 + 1])} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return Federation(
        few.job.model,
        replace(
            few.job.data,
            path=str(path),
            max_samples=40,
            prompt_column="a",
            target_column="b",
            padding="longest",
            seq_len=64,
        ),
    )


def run(federation: Federation, fedavg: Strategy, scheme: Scheme, rounds: int = 2) -> Any:
    found, outcomes = federation.run(
        scheme, fedavg, rounds=rounds, steps=None, evaluate_every=rounds
    )
    assert not list(chain.from_iterable(outcome.failures for outcome in outcomes))
    return found, outcomes


def sent(outcomes: list[RoundOutcome], way: str) -> list[int]:
    """Return the bytes of each round's training on both devices' links."""
    trained = [outcome.turns for outcome in outcomes if outcome.turns]
    return [sum(turn.link_bytes[way] for turn in turns) for turns in trained]


@pytest.mark.parametrize("route", [OPEN, HOME], ids=["open", "U"])
def test_differences_without_loss_train_what_boundaries_train(
    few: Federation, fedavg: Strategy, route: Route
) -> None:
    plain, _ = run(few, fedavg, Coded(route, EXACT, EXACT))
    coded, _ = run(few, fedavg, Coded(route, LASTING, LASTING))
    assert_equal(coded, plain, tolerance=1e-5)


def standing(federation: Federation) -> Federation:
    """Return a federation that learns nothing, so that no boundary changes."""
    found = Federation(federation.job.model, federation.job.data)
    found.job = replace(federation.job, optimizer=replace(federation.job.optimizer, lr=1e-12))
    return found


@pytest.mark.parametrize("route", [OPEN, HOME], ids=["open", "U"])
def test_what_did_not_change_since_the_last_turn_is_not_sent(
    few: Federation, fedavg: Strategy, route: Route
) -> None:
    almost = {**LASTING, "threshold": 0.01}  # more than rounding to bfloat16
    _, outcomes = run(standing(few), fedavg, Coded(route, almost, almost))
    for way in ("up", "down"):
        first, *later = sent(outcomes, way)
        assert max(later) < 0.5 * first  # labels and headers are left


def test_samples_of_other_lengths_are_known_again_whatever_their_mini_batch(
    unequal: Federation, fedavg: Strategy
) -> None:
    """No padding is sent or remembered, so that each is as it was beside others of its turn."""
    plain, before = run(unequal, fedavg, Coded(HOME, EXACT, EXACT))
    coded, after = run(unequal, fedavg, Coded(HOME, LASTING, LASTING))
    assert_equal(coded, plain, tolerance=1e-5)
    for way in ("up", "down"):  # all is sent, with a few bytes of the codec's own
        assert sent(after, way) == pytest.approx(sent(before, way), rel=0.02)
    almost = {**LASTING, "threshold": 0.01}
    _, outcomes = run(standing(unequal), fedavg, Coded(HOME, almost, almost))
    for way in ("up", "down"):
        first, later = sent(outcomes, way)
        assert later < 0.5 * first


def test_a_device_that_remembers_something_else_begins_afresh(
    few: Federation, fedavg: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lost its state, or lies about it: that costs its own turns their bytes, no other's."""
    read = node.read_remembered

    def read_or_lie(context: Any) -> Remembered:
        found: Remembered = read(context)
        if node.device_index(context) == 0:
            for stream, entries in found.streams.items():
                found.streams[stream] = tuple((sample + 1, entry) for sample, entry in entries)
        return found

    monkeypatch.setattr(node, "read_remembered", read_or_lie)
    almost = {**LASTING, "threshold": 0.01}  # more than rounding to bfloat16
    _, outcomes = run(standing(few), fedavg, Coded(OPEN, almost, EXACT))
    first, later = (outcome.turns for outcome in outcomes if outcome.turns)
    liar, honest = (
        b.link_bytes["up"] / a.link_bytes["up"] for a, b in zip(first, later, strict=True)
    )
    assert liar > 0.95
    assert honest < 0.5


def test_errors_of_gradients_go_on_over_turns(few: Federation, fedavg: Strategy) -> None:
    """Each sample once a turn: without memory over turns no error is ever made good."""
    forgetful = {**FEEDBACK, "over_turns": False}
    for rounds in (1, 2):
        kept, _ = run(few, fedavg, Coded(OPEN, EXACT, FEEDBACK), rounds)
        not_kept, _ = run(few, fedavg, Coded(OPEN, EXACT, forgetful), rounds)
        apart = max(float((kept[name] - not_kept[name]).abs().max()) for name in kept)
        assert (apart > 1e-4) == (rounds > 1)


def test_edges_that_are_nodes_refuse_memory_over_turns(
    federation: Federation, fedavg: Strategy, tmp_path: Path
) -> None:
    scheme = Coded(Route.three_tier(4, 1, 3), LASTING, EXACT)
    with pytest.raises(PlanError, match="over_turns must be false behind an edge node"):
        federation.run(scheme, fedavg, edge_folder=tmp_path)
