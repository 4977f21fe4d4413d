"""What came out of a round, before anybody aggregates or reports it."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from torch import Tensor

from fedsplit.errors import NodeLost
from fedsplit.flower.messages import read_count
from fedsplit.plan import Branch, Failure, RoundPlan, Turn
from fedsplit.schemes.turnout import Turnout
from fedsplit.transport import TurnBounds

if TYPE_CHECKING:
    from fedsplit.flower.server.standing import Standing

WEIGHT = "num-examples"
"""What of a reply says how much it counts."""
ABSURD_NORM = 1e8
"""No training brings an update as long as this; what does is broken or meant to break."""


@dataclass(frozen=True)
class TurnOutcome:
    """What one turn did: sums over its mini-batches, bytes on the wire, wall seconds.

    `link_bytes` maps "up" and "down" (device to first server) and, on routes with an edge,
    "backhaul-up" and "backhaul-down" to bytes counted on the wire; where adapters went over the
    device's link, "adapters-up" and "adapters-down" to theirs. `n_correct` is None where the model
    is no classifier; `classes` are those of `fedsplit.transport.EvalReply`, added up. `compute_s`,
    `link_s` (wall seconds) and `peak_bytes` are what the device says of itself; `wall_s` is the
    server's.
    """

    turn: Turn
    loss_sum: float
    n_targets: int
    n_correct: int | None
    n_samples: int
    steps: int
    link_bytes: Mapping[str, int]
    wall_s: float
    compute_s: float = 0.0
    link_s: float = 0.0
    peak_bytes: int = 0
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class BranchOutcome:
    """A branch after its turns: its complete adapters and what each turn did."""

    index: int
    branch: Branch
    adapters: Mapping[str, Tensor]
    turns: tuple[TurnOutcome, ...]
    failures: tuple[Failure, ...] = ()

    @property
    def survived(self) -> bool:
        """Whether any turn of the branch was completed."""
        return len(self.turns) > 0


@dataclass(frozen=True)
class RoundOutcome:
    """A whole round: its plan, its branches, who failed, and the wall-clock seconds it took.

    `failures` are those of devices and edges, in training and evaluation, as they were noticed.
    `aggregation_error` is `fedsplit.execution.aggregate.aggregation_error` of the branches; None
    where there was one alone. `turnout` says whom the round waited for, and `standing` what it
    leaves to the next.
    """

    server_round: int
    plan: RoundPlan
    branches: tuple[BranchOutcome, ...]
    wall_s: float
    evaluation: tuple[TurnOutcome, ...] = ()
    failures: tuple[Failure, ...] = ()
    aggregation_error: float | None = None
    turnout: Turnout | None = None
    standing: "Standing | None" = None

    @property
    def turns(self) -> tuple[TurnOutcome, ...]:
        """Every completed training turn, by branch."""
        return tuple(turn for branch in self.branches for turn in branch.turns)


def evaluated_nowhere(outcome: RoundOutcome) -> bool:
    """Return whether all devices failed that were to evaluate a round: it may be spoilt."""
    failed = any(failure.phase == "evaluate" for failure in outcome.failures)
    return failed and not outcome.evaluation


def mean_loss(turns: tuple[TurnOutcome, ...]) -> float | None:
    """Return the mean loss per target over `turns`, or None if nothing was computed."""
    targets = sum(turn.n_targets for turn in turns)
    return sum(turn.loss_sum for turn in turns) / targets if targets else None


def accuracy(turns: tuple[TurnOutcome, ...]) -> float | None:
    """Return the share of targets predicted right over `turns`, or None if not counted."""
    counted = [turn for turn in turns if turn.n_correct is not None and turn.n_targets]
    targets = sum(turn.n_targets for turn in counted)
    return sum(turn.n_correct or 0 for turn in counted) / targets if targets else None


def macro_f1(turns: tuple[TurnOutcome, ...]) -> float | None:
    """Return the mean over classes of the F1 score over `turns`; None if not counted.

    ``2 right / (taken for it + of it)`` of each class; classes of which there is nothing are left
    out, as scikit-learn does it.
    """
    sums = [sum(column) for column in zip_longest(*(turn.classes for turn in turns), fillvalue=0)]
    triples = zip(sums[::3], sums[1::3], sums[2::3], strict=True)
    scores = [2 * right / (said + true) for right, said, true in triples if said + true]
    return sum(scores) / len(scores) if scores else None


def check_complete(trained: Mapping[str, Tensor], handed_out: Mapping[str, Tensor]) -> None:
    """Refuse adapters that are not finite, or not those `handed_out`.

    Raises
    ------
    NodeLost
        Naming the first that is wrong.
    """
    if trained.keys() != handed_out.keys():
        raise NodeLost(f"adapters: {len(trained)} came back of {len(handed_out)} handed out")
    for name, tensor in trained.items():
        if tensor.shape != handed_out[name].shape or not tensor.isfinite().all():
            raise NodeLost(f"adapter {name!r} came back misshapen or not finite")


def check_update(
    trained: Mapping[str, Tensor], handed_out: Mapping[str, Tensor], max_norm: float
) -> None:
    """Refuse an update that is longer than `max_norm`, over all adapters together.

    Raises
    ------
    NodeLost
        Telling how long it is.
    """
    squares = (
        (tensor.double() - handed_out[name].double()).square().sum()
        for name, tensor in trained.items()
    )
    norm = math.sqrt(sum(map(float, squares)))
    if not norm <= max_norm:
        raise NodeLost(f"adapters: their update has the norm {norm:.3g}, above {max_norm:g}")


def check_counts(outcome: "TurnOutcome", bounds: TurnBounds) -> None:
    """Refuse what a device says it did if the server knows better.

    Raises
    ------
    NodeLost
        If it did another number of steps than it was to do, or more than fits into them.
    """
    if outcome.steps != bounds.steps:
        raise NodeLost(f"answer: steps={outcome.steps} must be {bounds.steps}, as planned")
    samples = outcome.steps * bounds.samples
    targets = outcome.n_samples * bounds.tokens
    for name, value, most in (
        ("n-samples", outcome.n_samples, samples),
        ("n-targets", outcome.n_targets, targets),
        ("n-correct", outcome.n_correct or 0, outcome.n_targets),
    ):
        if value > most:
            raise NodeLost(f"answer: {name}={value} must be at most {most}")
    sums = [sum(outcome.classes[place::3]) for place in range(3)]
    if outcome.classes and sums != [outcome.n_correct, outcome.n_targets, outcome.n_targets]:
        raise NodeLost(f"answer: classes={sums} must add up to n-correct and n-targets")


def turn_outcome(
    turn: Turn, metrics: Mapping[str, float], backhaul: Mapping[str, int], started_s: float
) -> TurnOutcome:
    """Return what a turn did, from its device's `metrics` and the bytes between the servers.

    `started_s` is when it began, on `time.monotonic`'s clock.

    Raises
    ------
    NodeLost
        If a metric is absent or cannot be.
    """
    radio = {"up": read_count(metrics, "bytes-up"), "down": read_count(metrics, "bytes-down")}
    if metrics.get("adapters-down"):
        radio |= {name: read_count(metrics, name) for name in ("adapters-up", "adapters-down")}
    if "loss-sum" not in metrics:
        raise NodeLost("answer: loss-sum must be a finite number")
    n_correct = read_count(metrics, "n-correct", -1)
    n_classes = sum(name.startswith("class-") for name in metrics) // 3
    return TurnOutcome(
        turn=turn,
        loss_sum=metrics["loss-sum"],
        n_targets=read_count(metrics, "n-targets"),
        n_correct=n_correct if n_correct >= 0 else None,
        classes=tuple(read_count(metrics, f"class-{at}") for at in range(3 * n_classes)),
        n_samples=read_count(metrics, "n-samples"),
        steps=read_count(metrics, "steps"),
        link_bytes={**radio, **backhaul},
        wall_s=time.monotonic() - started_s,
        compute_s=_read_seconds(metrics, "compute-s"),
        link_s=_read_seconds(metrics, "link-s"),
        peak_bytes=read_count(metrics, "peak-bytes"),
    )


def _read_seconds(metrics: Mapping[str, float], name: str) -> float:
    value = float(metrics.get(name, -1.0))
    if value < 0:
        raise NodeLost(f"answer: {name}={value!r} must be at least 0")
    return value
