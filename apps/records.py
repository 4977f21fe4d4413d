"""From what came out of a round to what is kept of it."""

import math
from collections.abc import Iterable

from fedsplit.flower import RoundOutcome, TurnOutcome
from fedsplit.flower.outcome import accuracy, mean_loss
from fedsplit.report import Failure, RoundRecord

# Which tier a link's bytes are counted to, by the name of the link.
_TIERS = {"": "device", "backhaul-": "edge"}


def record_of(outcome: RoundOutcome, task: str) -> RoundRecord:
    """Return the record of a round; bytes are those of training and evaluation together."""
    eval_loss = mean_loss(outcome.evaluation)
    language = task == "causal-lm" and eval_loss is not None
    turns = [*outcome.turns, *outcome.evaluation]
    return RoundRecord(
        round=outcome.server_round,
        train_loss=mean_loss(outcome.turns),
        eval_loss=eval_loss,
        perplexity=_perplexity(eval_loss) if language else None,
        accuracy=accuracy(outcome.evaluation),
        bytes_up=_bytes(turns, "up"),
        bytes_down=_bytes(turns, "down"),
        wall_s=outcome.wall_s,
        participants=tuple(turn.turn.device for turn in outcome.turns),
        failures=tuple(
            Failure(failure.device, failure.phase, failure.reason) for failure in outcome.failures
        ),
    )


def _perplexity(loss: float | None) -> float:
    return math.exp(min(loss if loss is not None else 0.0, 700.0))


def _bytes(turns: Iterable[TurnOutcome], direction: str) -> dict[str, int]:
    counted: dict[str, int] = {}
    for turn in turns:
        for prefix, tier in _TIERS.items():
            count = turn.link_bytes.get(prefix + direction)
            if count is not None:
                counted[tier] = counted.get(tier, 0) + count
    return counted
