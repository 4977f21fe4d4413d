"""Which round was the best, and when no better one is to be expected: from the records alone.

So a run that goes on decides as one that was never interrupted.
"""

from collections.abc import Sequence

from fedsplit.report.records import RoundRecord


def judged(record: RoundRecord, by: str) -> float | None:
    """Return the evaluation loss of a round, the devices' or the server's; None without one."""
    return record.eval_loss if by == "eval_loss" else (record.central or {}).get("loss")


def best_round(records: Sequence[RoundRecord], by: str, min_delta: float = 0.0) -> int | None:
    """Return the first round whose loss no later one undercut by more than `min_delta` (nats).

    The evaluation before any training does not count; None if there was no other.
    """
    best: tuple[int, float] | None = None
    for record in records:
        loss = judged(record, by)
        if record.round and loss is not None and (best is None or loss < best[1] - min_delta):
            best = record.round, loss
    return None if best is None else best[0]


def why_stop(
    records: Sequence[RoundRecord], by: str, patience: int | None, min_delta: float
) -> str | None:
    """Return why no further round is to be trained, or None.

    After `patience` rounds without a better loss; a round that was not evaluated ends nothing.
    """
    if patience is None or not records or judged(records[-1], by) is None:
        return None
    best, last = best_round(records, by, min_delta), records[-1].round
    if best is None or last - best < patience:
        return None
    return f"{by} has not fallen since round {best}, for stop.patience={patience} rounds"
