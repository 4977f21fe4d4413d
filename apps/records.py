"""From what came out of a round to what is kept of it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from fedsplit.fleet import Timeline
from fedsplit.flower import RoundOutcome, TurnOutcome
from fedsplit.flower.server.outcome import accuracy, macro_f1, mean_loss
from fedsplit.plan import DEVICE, Route
from fedsplit.report import RoundRecord, TurnRow
from fedsplit.report.records import Arrival

from .outputs import METRICS

# Which tier a link's bytes are counted to, by the name of the link.
_TIERS = {"": "device", "backhaul-": "edge"}


def record_of(outcome: RoundOutcome, task: str, metrics: Sequence[str] = METRICS) -> RoundRecord:
    """Return the record of a round; bytes are those of training and evaluation together."""
    there = outcome.turnout
    eval_loss = mean_loss(outcome.evaluation)
    turns = [*outcome.turns, *outcome.evaluation]
    found = scores(eval_loss, accuracy(outcome.evaluation), task, metrics)
    return RoundRecord(
        round=outcome.server_round,
        train_loss=mean_loss(outcome.turns),
        eval_loss=eval_loss,
        perplexity=found.get("perplexity"),
        accuracy=found.get("accuracy"),
        macro_f1=macro_f1(outcome.evaluation),
        token_accuracy=found.get("token_accuracy"),
        bytes_up=_bytes(turns, "up"),
        bytes_down=_bytes(turns, "down"),
        wall_s=outcome.wall_s,
        adapter_bytes_up=_bytes(turns, "adapters-up"),
        adapter_bytes_down=_bytes(turns, "adapters-down"),
        participants=tuple(dict.fromkeys(turn.turn.device for turn in outcome.turns)),
        failures=outcome.failures,
        aggregation_error=outcome.aggregation_error,
        late=there.late if there else (),
        arrived=tuple(
            Arrival(device, one.since, weight)
            for one, weight in (zip(there.arriving, there.weights, strict=True) if there else ())
            for device in one.devices
        ),
        left=there.left if there else (),
        exhausted=there.exhausted if there else (),
    )


def scores(
    loss: float | None, right: float | None, task: str, metrics: Sequence[str]
) -> dict[str, float]:
    """Return what goes with an evaluation's loss, by name.

    Of a language model those of `metrics`; of a classifier its accuracy. `right` is the share of
    targets predicted right.
    """
    if task != "causal-lm":
        return {} if right is None else {"accuracy": right}
    found = {"perplexity": _perplexity(loss), "token_accuracy": right}
    if loss is None:
        return {}
    return {name: value for name in metrics if (value := found[name]) is not None}


def turn_rows(
    outcome: RoundOutcome, sites: Mapping[int, str], line: Timeline | None = None
) -> list[TurnRow]:
    """Return a row for each turn of a round, completed or lost.

    Parameters
    ----------
    outcome : RoundOutcome
        The round.
    sites : mapping of int to str
        Devices' names.
    line : Timeline, optional
        What its training was modelled to take.
    """
    number = outcome.server_round
    rows = [
        replace(
            _turn_row(number, "train", turn, sites), modelled_compute_s=own, modelled_link_s=rest
        )
        for turn, own, rest in _modelled_turns(outcome, line)
    ]
    rows += [_turn_row(number, "evaluate", turn, sites) for turn in outcome.evaluation]
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


def phases(rows: Iterable[TurnRow]) -> dict[str, dict[str, float]] | None:
    """Return the seconds of a round's training turns together, measured and modelled, by phase.

    "compute" is the devices' own, "link" their waiting for the rest of the route, "wait" what else
    the server sees of a turn: loading, starting, messages. Nothing models that.
    """
    trained = [row for row in rows if row.modelled_compute_s is not None]
    if not trained:
        return None
    measured = {
        "compute": sum(row.compute_s for row in trained),
        "link": sum(row.link_s for row in trained),
        "wait": sum(max(row.wall_s - row.compute_s - row.link_s, 0.0) for row in trained),
    }
    modelled = {
        "compute": sum(row.modelled_compute_s or 0.0 for row in trained),
        "link": sum(row.modelled_link_s or 0.0 for row in trained),
        "wait": 0.0,
    }
    return {
        phase: {"measured_s": seconds, "modelled_s": modelled[phase]}
        for phase, seconds in measured.items()
    }


def _modelled_turns(
    outcome: RoundOutcome, line: Timeline | None
) -> Iterator[tuple[TurnOutcome, float | None, float | None]]:
    """Yield each training turn with its seconds of computing and waiting, modelled."""
    counts = [len(branch.turns) for branch in outcome.plan.branches]
    starts = list(accumulate(counts, initial=0))
    computing = None if line is None else line.turn_device_s()
    for branch in outcome.branches:
        for done in branch.turns:
            if line is None or computing is None:
                yield done, None, None
                continue
            place = starts[branch.index] + branch.branch.turns.index(done.turn)
            own_s = float(computing[place])
            whole_s = float(line.turn_end_s[place] - line.turn_start_s[place])
            yield done, own_s, max(whole_s - own_s, 0.0)


def _turn_row(
    server_round: int, phase: str, turn: TurnOutcome, sites: Mapping[int, str]
) -> TurnRow:
    link = turn.link_bytes
    return TurnRow(
        round=server_round,
        phase=phase,
        device=turn.turn.device,
        site=sites.get(turn.turn.device, ""),
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
