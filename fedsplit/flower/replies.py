"""What a wrapped strategy is told of branches, and what of its aggregate is looked at."""

import random

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedsplit.errors import FedsplitError
from fedsplit.flower.server.outcome import WEIGHT, TurnOutcome, accuracy, macro_f1, mean_loss
from fedsplit.seeds import derive_seed


def metrics_of(turns: tuple[TurnOutcome, ...], weight: int) -> dict[str, float]:
    """Return what `turns` did, as a reply that counts so much says it."""
    metrics: dict[str, float] = {WEIGHT: weight, "loss": mean_loss(turns) or 0.0}
    if (right := accuracy(turns)) is not None:
        metrics["accuracy"] = right
    if (f1 := macro_f1(turns)) is not None:
        metrics["macro-f1"] = f1
    return metrics


def metrics_reply(turns: tuple[TurnOutcome, ...], weight: int, message: Message) -> Message:
    """Return the reply to `message` that says what `turns` did, and counts so much."""
    metrics = MetricRecord({**metrics_of(turns, weight)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def seed_globals(seed: int, *names: str | int) -> None:
    """Seed the global generators, which Flower's strategies draw from."""
    derived = derive_seed(seed, *names) % 2**32
    random.seed(derived)
    np.random.seed(derived)  # noqa: NPY002 - what Flower's strategies draw from


def refuse_non_finite(arrays: ArrayRecord, server_round: int) -> None:
    """Refuse an aggregate that is not finite.

    Raises
    ------
    FedsplitError
        Naming the array.
    """
    for name, array in arrays.items():
        values = array.numpy()
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise FedsplitError(f"round {server_round}: {name} is not finite after aggregation")
