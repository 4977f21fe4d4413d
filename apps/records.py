"""From what came out of a round to what is kept of it."""

import math
from collections.abc import Iterable, Mapping

from fedsplit.flower import RoundOutcome, TurnOutcome
from fedsplit.flower.server.outcome import accuracy, macro_f1, mean_loss
from fedsplit.plan import DEVICE, Route
from fedsplit.report import RoundRecord, TurnRow

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
        macro_f1=macro_f1(outcome.evaluation),
        bytes_up=_bytes(turns, "up"),
        bytes_down=_bytes(turns, "down"),
        wall_s=outcome.wall_s,
        adapter_bytes_up=_bytes(turns, "adapters-up"),
        adapter_bytes_down=_bytes(turns, "adapters-down"),
        participants=tuple(dict.fromkeys(turn.turn.device for turn in outcome.turns)),
        failures=outcome.failures,
    )


def turn_rows(outcome: RoundOutcome, sites: Mapping[int, str]) -> list[TurnRow]:
    """Return a row for each turn of a round, completed or lost; `sites` are devices' names."""
    done = [("train", turn) for turn in outcome.turns]
    done += [("evaluate", turn) for turn in outcome.evaluation]
    rows = [
        _turn_row(outcome.server_round, phase, turn, sites.get(turn.turn.device, ""))
        for phase, turn in done
    ]
    return rows + [
        TurnRow(
            round=outcome.server_round,
            phase=failure.phase,
            device=failure.index,
            site=sites.get(failure.index, ""),
            failure=failure.reason,
        )
        for failure in outcome.failures
        if failure.role == DEVICE
    ]


def _turn_row(server_round: int, phase: str, turn: TurnOutcome, site: str) -> TurnRow:
    link = turn.link_bytes
    return TurnRow(
        round=server_round,
        phase=phase,
        device=turn.turn.device,
        site=site,
        route=str(turn.turn.route),
        samples=turn.n_samples,
        steps=turn.steps,
        targets=turn.n_targets,
        loss=mean_loss((turn,)),
        accuracy=accuracy((turn,)),
        bytes_up=link.get("up", 0),
        bytes_down=link.get("down", 0),
        backhaul_bytes_up=link.get("backhaul-up", 0),
        backhaul_bytes_down=link.get("backhaul-down", 0),
        adapter_bytes_up=link.get("adapters-up", 0),
        adapter_bytes_down=link.get("adapters-down", 0),
        compute_s=turn.compute_s,
        link_s=turn.link_s,
        wall_s=turn.wall_s,
        peak_bytes=turn.peak_bytes,
    )


def sent_bytes(outcome: RoundOutcome) -> dict[tuple[int, int, int], tuple[float, float]]:
    """Return the bytes that each finished turn put on each hop, for the timeline.

    A device's link counts bytes up and down, an edge's link to the cloud too. On a U-shaped route
    both directions carry a boundary and a gradient of equal raw size, so each gets half; what a
    round costs does not depend on it. What comes home to a device behind an edge crosses both
    links, so that the hop from edge to cloud has only the rest of the edge's link.
    """
    sent: dict[tuple[int, int, int], tuple[float, float]] = {}
    for branch in outcome.branches:
        for done in branch.turns:
            place = branch.branch.turns.index(done.turn)
            hops = _hops(done.turn.route, done.link_bytes)
            sent |= {(branch.index, place, hop): both for hop, both in hops.items()}
    return sent


def _hops(route: Route, link_bytes: Mapping[str, int]) -> dict[int, tuple[float, float]]:
    """Return the bytes forward and backward on each hop of `route` that a link reported."""
    last = len(route.segments) - 2
    if last < 0:
        return {}
    up, down = float(link_bytes["up"]), float(link_bytes["down"])
    wired = "backhaul-up" in link_bytes
    wire_up, wire_down = (link_bytes.get(f"backhaul-{way}", 0) for way in ("up", "down"))
    if not route.returns_home:
        return {0: (up, down), **({1: (wire_up, wire_down)} if wired else {})}
    hops = {0: (up / 2, down / 2), last: (down / 2, up / 2)}
    if wired and last == 2:
        hops[1] = (max(wire_up - up / 2, 0.0), max(wire_down - down / 2, 0.0))
    return hops


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
