"""The best round and the end of a run, from the records alone."""

import pytest

from fedsplit.report import RoundRecord
from fedsplit.report.best import best_round, why_stop

NO = None


def records(losses, **fields):
    return [RoundRecord(n, eval_loss=loss, **fields) for n, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "best", "ends_after"),
    [
        # Round 0 is the evaluation before any training.
        ([4, 3, 2, 1], 1, 0.0, 3, NO),
        ([4, 3, 3, 3], 2, 0.0, 1, 3),
        ([4, 3, 3, 2, 2], 2, 0.0, 3, NO),
        ([4, 3, 3, 2, 2, 2], 2, 0.0, 3, 5),
        ([1, 5, 4, 3], 1, 0.0, 3, NO),  # worse than untrained, but falling
        ([4, 3, 2.95, 2.85, 2.8], 2, 0.1, 3, NO),  # small steps add up
        ([4, 3, 2.95, 2.93], 2, 0.1, 1, 3),
        ([4, 3, 4, NO, 4], 2, 0.0, 1, 4),  # a round that nobody evaluated ends nothing
        ([4, NO, NO, NO], 1, 0.0, NO, NO),
        ([4, 3, 4, 5], NO, 0.0, 1, NO),
        ([], 1, 0.0, NO, NO),
    ],
)
def test_a_run_ends_when_its_loss_has_not_fallen(losses, patience, min_delta, best, ends_after):
    rounds = records(losses)
    assert best_round(rounds, "eval_loss", min_delta) == best
    ended = [
        n
        for n in range(len(rounds))
        if why_stop(rounds[: n + 1], "eval_loss", patience, min_delta) is not None
    ]
    assert (ended[0] if ended else None) == ends_after


def test_the_reason_names_the_setting():
    reason = why_stop(records([4, 3, 3]), "eval_loss", 1, 0.0)
    assert reason == "eval_loss has not fallen since round 1, for stop.patience=1 rounds"


def test_the_server_s_own_test_set_may_judge():
    rounds = [
        RoundRecord(n, eval_loss=3.0 - n, central={"loss": 3.0 + n} if n != 2 else None)
        for n in range(4)
    ]
    assert best_round(rounds, "central_loss") == 1
    assert best_round(rounds, "eval_loss") == 3
    assert why_stop(rounds, "central_loss", 2, 0.0) is not None
    assert why_stop(rounds[:3], "central_loss", 1, 0.0) is None
