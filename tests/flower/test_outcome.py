"""Figures of a round, from what its turns counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from fedsplit.execution.tier import _count_classes
from fedsplit.flower.server.outcome import TurnOutcome, accuracy, macro_f1
from fedsplit.models import Output
from fedsplit.plan import Route, Turn

TURN = TurnOutcome(
    turn=Turn(device=0, route=Route.two_tier(2, 1), steps=1),
    loss_sum=1.0,
    n_targets=0,
    n_correct=None,
    n_samples=0,
    steps=1,
    link_bytes={},
    wall_s=0.0,
)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_accuracy_and_macro_f1_of_several_devices_are_scikit_learn_s(n_classes: int) -> None:
    rng = np.random.default_rng(n_classes)
    turns, said, true = [], [], []
    for size in (1, 7, 40):
        scores = torch.tensor(rng.normal(size=(size, n_classes)))
        labels = torch.tensor(rng.integers(n_classes - 1, size=size))
        right = int((scores.argmax(1) == labels).sum())
        counts = _count_classes(Output(torch.tensor(0.0), size, scores), labels)
        turns.append(replace(TURN, n_targets=size, n_correct=right, classes=counts))
        said += scores.argmax(1).tolist()
        true += labels.tolist()
    assert macro_f1(tuple(turns)) == pytest.approx(f1_score(true, said, average="macro"))
    assert accuracy(tuple(turns)) == pytest.approx(accuracy_score(true, said))


def test_nothing_counted_is_no_score() -> None:
    assert macro_f1((TURN,)) is None
    assert accuracy((TURN,)) is None
