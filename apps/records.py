"""From what came out of a round to what is kept of it."""

import math
from collections.abc import Iterable

from fedsplit.flower import RoundOutcome, TurnOutcome
from fedsplit.flower.server.outcome import accuracy, mean_loss
from fedsplit.report import RoundRecord

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
        adapter_bytes_up=_bytes(turns, "adapters-up"),
        adapter_bytes_down=_bytes(turns, "adapters-down"),
        participants=tuple(dict.fromkeys(turn.turn.device for turn in outcome.turns)),
        failures=outcome.failures,
    )


def sent_bytes(outcome: RoundOutcome) -> dict[tuple[int, int, int], tuple[float, float]]:
    """Return the bytes that each finished turn put on each hop, for the timeline.

    A device's link counts bytes up and down. On a U-shaped route both directions carry a boundary
    and a gradient of equal raw size, so each gets half; what a round costs does not depend on it.
    """
    sent: dict[tuple[int, int, int], tuple[float, float]] = {}
    for branch in outcome.branches:
        for done in branch.turns:
            place = branch.branch.turns.index(done.turn)
            up, down = done.link_bytes["up"], done.link_bytes["down"]
            if done.turn.route.returns_home:
                sent[branch.index, place, 0] = (up / 2, down / 2)
                sent[branch.index, place, 1] = (down / 2, up / 2)
            elif len(done.turn.route.segments) > 1:
                sent[branch.index, place, 0] = (up, down)
            if "backhaul-up" in done.link_bytes:
                backhaul = (done.link_bytes["backhaul-up"], done.link_bytes["backhaul-down"])
                sent[branch.index, place, 1] = backhaul
    return sent


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
