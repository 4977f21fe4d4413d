"""The device's turn: its loop over mini-batches, on any route."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from fedsplit.codec import Remembered
from fedsplit.errors import FedsplitError
from fedsplit.execution.lane import compute
from fedsplit.execution.optim import OptimizerSpec, State
from fedsplit.execution.tier import Tier
from fedsplit.models import Boundary, SplitModel
from fedsplit.models.ranks import at_rank
from fedsplit.plan import DEVICE, CodecPlan, Route, Segment
from fedsplit.privacy import Defence, PrivacySpec
from fedsplit.transport import EvalReply, Link, LinkStats, OpenRequest

if TYPE_CHECKING:
    from fedsplit.data import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class StepReport:
    """One mini-batch: its loss, mean over `n_targets`; `n_correct` and `classes` where known."""

    loss: float
    n_targets: int
    n_samples: int
    n_correct: int | None = None
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class TurnResult:
    """What a turn did, as its device saw it.

    Parameters
    ----------
    adapters : dict of str to Tensor
        The trained values of the device's segments (empty after an evaluation).
    reports : tuple of StepReport
        The mini-batches in order.
    stats : LinkStats
        Bytes that the device's link carried.
    compute_s, link_s : float
        Wall seconds spent computing, and waiting for the rest of the route.
    state : dict of str to State
        What the device's optimizer keeps of each of its parameters, where it is to be kept.
    """

    adapters: dict[str, Tensor]
    reports: tuple[StepReport, ...]
    stats: LinkStats = field(default_factory=LinkStats)
    compute_s: float = 0.0
    link_s: float = 0.0
    state: dict[str, State] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Mini-batches."""
        return len(self.reports)

    @property
    def loss(self) -> float:
        """Mean loss over all targets (NaN without any)."""
        return self.loss_sum / self.n_targets if self.n_targets else float("nan")

    @property
    def loss_sum(self) -> float:
        """Sum of the loss over all targets."""
        return sum(report.loss * report.n_targets for report in self.reports if report.n_targets)

    @property
    def n_targets(self) -> int:
        """Tokens (or images) that the loss was taken over."""
        return sum(report.n_targets for report in self.reports)

    @property
    def n_samples(self) -> int:
        """Samples in all mini-batches."""
        return sum(report.n_samples for report in self.reports)

    @property
    def n_correct(self) -> int | None:
        """Images classified right; None where the model is no classifier."""
        counts = [report.n_correct for report in self.reports if report.n_correct is not None]
        return sum(counts) if counts else None

    @property
    def classes(self) -> tuple[int, ...]:
        """Three numbers of each class of texts, see `EvalReply`; empty for other models."""
        counts = [report.classes for report in self.reports if report.classes]
        return tuple(map(sum, zip(*counts, strict=True)))


def train_turn(
    model: SplitModel,
    route: Route,
    batches: "Iterable[Batch]",
    *,
    adapters: Mapping[str, Tensor] | None,
    optimizer: OptimizerSpec,
    seed: int,
    steps: int | None = None,
    kept: Mapping[str, State] | None = None,
    link: Link | None = None,
    token: str | None = None,
    codec: CodecPlan | None = None,
    privacy: PrivacySpec | None = None,
    rank: int | None = None,
    frozen: bool = False,
    remembered: Remembered | None = None,
) -> TurnResult:
    """Train the device's segments of `route` on `batches`, the rest over `link`.

    Parameters
    ----------
    model : SplitModel
        Holds the device's segments.
    route : Route
        Open, U-shaped or device-only.
    batches : iterable of Batch
        One step each. Labels leave the device only on an open route.
    adapters : mapping of str to Tensor or None
        Values to start from, at least those of the device's segments. None: they are fetched over
        the link, and handed up over it once trained.
    optimizer : OptimizerSpec
        Fresh for this turn.
    seed : int
        Seed of the turn, the same on every tier.
    steps : int or None
        How many `batches` there are; needed where the learning rate follows a schedule.
    kept : mapping of str to State, optional
        What the device's optimizer kept of its parameters (`TurnResult.state`), to go on with.
    link : Link or None
        Leads to the second segment; None on a device-only route.
    token : str or None
        Opens the turn there.
    codec : CodecPlan or None
        How boundaries travel; None for as they are.
    privacy : PrivacySpec or None
        What is done to boundaries and gradients before they leave the device; None for nothing.
    rank : int or None
        Components of the adapters that are fetched; None for all that the model has.
    frozen : bool
        Whether the device's blocks only infer (open routes), and only what is not held elsewhere.
    remembered : Remembered or None
        What the device's codecs remember of its earlier turns; brought up to date.

    Raises
    ------
    LinkError
        If the rest of the route refuses, fails or is gone.
    FedsplitError
        If arguments do not fit the route, or a loss or gradient is not finite.
    """
    turn = _DeviceTurn(model, route, optimizer, seed, link, privacy, steps, kept, rank, frozen)
    turn.run(adapters, batches, token, codec or CodecPlan(), remembered)
    return turn.result()


def evaluate_turn(
    model: SplitModel,
    route: Route,
    batches: "Iterable[Batch]",
    *,
    adapters: Mapping[str, Tensor] | None,
    seed: int,
    link: Link | None = None,
    token: str | None = None,
    codec: CodecPlan | None = None,
    privacy: PrivacySpec | None = None,
) -> TurnResult:
    """Evaluate on `batches` without training; parameters and errors as in `train_turn`."""
    turn = _DeviceTurn(model, route, None, seed, link, privacy)
    turn.run(adapters, batches, token, codec or CodecPlan())
    return turn.result()


class _DeviceTurn:
    """State of a turn on its device."""

    def __init__(
        self,
        model: SplitModel,
        route: Route,
        optimizer: OptimizerSpec | None,
        seed: int,
        link: Link | None,
        privacy: PrivacySpec | None,
        steps: int | None = None,
        kept: Mapping[str, State] | None = None,
        rank: int | None = None,
        frozen: bool = False,
    ) -> None:
        segments = route.on(DEVICE)
        if (len(route.segments) > 1) != (link is not None):
            raise FedsplitError(
                f"link: must be given if route={route} leaves the device, only then"
            )
        self._model, self._route, self._segments = model, route, segments
        self._optimizer = optimizer
        self._seed = seed
        self._train, self._frozen = optimizer is not None, frozen
        self._held: set[int] = set()  # samples whose boundaries the next tier has
        self._keeps = optimizer is not None and optimizer.keep_state
        self._steps, self._kept, self._rank = steps, kept, rank
        self._link = link
        self._behind: float | None = 0.0  # norm of a step's gradients on the other tiers
        self._defence = Defence(privacy or PrivacySpec(), seed)
        self._reports: list[StepReport] = []
        self._stats = LinkStats()
        self._total_s = self._link_s = 0.0

    def run(
        self,
        adapters: Mapping[str, Tensor] | None,
        batches: "Iterable[Batch]",
        token: str | None,
        codec: CodecPlan,
        remembered: Remembered | None = None,
    ) -> None:
        """Open the link, go through `batches`, close the link; hang up on any error."""
        started = time.perf_counter()
        link = self._link
        try:
            if link is not None:
                if token is None:
                    raise FedsplitError("token: must be given on a route that leaves the device")
                request = OpenRequest(
                    token,
                    self._route,
                    1,
                    codec=codec,
                    seed=self._seed,
                    train=self._train,
                    adapters_on_link=adapters is None,
                    remembered=remembered,
                )
                returning = None
                if self._route.returns_home:
                    batches, pixels = _pixels(batches)
                    cut = self._segments[-1].start
                    returning = compute(lambda: self._model.crossing(cut, pixels))
                self._held |= self._wait(lambda: link.open(request, returning))
            start = self._fetch() if adapters is None else adapters
            optimizer = None if self._frozen else self._optimizer
            self._tier = Tier(
                self._model, self._segments, start, optimizer, self._seed, self._steps, self._kept
            )
            together = 1 if self._optimizer is None else self._optimizer.accumulate
            rest = iter(batches)
            while group := list(islice(rest, together)):
                self._run_step(group)
            if link is not None:
                if adapters is None and self._train and not self._frozen:
                    self._wait(lambda: link.hand_up(self._tier.adapters()))
                self._stats = self._wait(link.close)
        except BaseException:
            if link is not None:
                link.abort()
            raise
        self._total_s = time.perf_counter() - started

    def _fetch(self) -> dict[str, Tensor]:
        link = self._link
        if link is None:
            raise FedsplitError("adapters: must be given on a route that never leaves the device")
        forms = [self._model.forms(segment, residuals=True) for segment in self._segments]
        expected = {name: form for found in forms for name, form in found.items()}
        return self._wait(lambda: link.fetch(at_rank(expected, self._rank)))

    def result(self) -> TurnResult:
        """Return what the turn did."""
        return TurnResult(
            self._tier.adapters() if self._train and not self._frozen else {},
            tuple(self._reports),
            self._stats,
            self._total_s - self._link_s,
            self._link_s,
            state=self._tier.state() if self._keeps else {},
        )

    def _run_step(self, group: "list[Batch]") -> None:
        """Go through the mini-batches that one update is made of, each weighted by its targets."""
        counts = [self._model.n_targets(batch.inputs) for batch in group]
        targets = sum(counts)
        at_once = 1 if self._optimizer is None else self._optimizer.overlap
        under_way: deque[Callable[[], StepReport]] = deque()
        for batch, count in zip(group, counts, strict=True):
            share = 1.0 if len(group) == 1 else count / max(targets, 1)
            if self._train and not self._frozen:
                self._tier.take(share)
            under_way.append(self._begin(batch, share))
            if len(under_way) == at_once:
                self._reports.append(under_way.popleft()())
            self._tier.end()
        self._reports += [finish() for finish in under_way]
        if self._optimizer is not None:
            norm = None
            if self._optimizer.clip is not None:
                norm = self._tier.norm(self._behind)
                if self._link is not None:
                    self._link.update(norm)
            self._tier.update(norm)

    def _begin(self, batch: "Batch", share: float) -> Callable[[], StepReport]:
        """Begin a mini-batch; return how to end it, after those that began before it."""
        link = self._link
        if link is not None and not self._route.returns_home:
            return self._open_step(batch, share, link)
        done = self._local_step(batch, share) if link is None else self._u_step(batch, share, link)
        return lambda: done

    def _local_step(self, batch: "Batch", share: float) -> StepReport:
        (segment,) = self._segments
        if self._train:
            score, _ = self._tier.train_on(segment, batch.inputs, share=share)
        else:
            score = self._tier.evaluate(segment, batch.inputs)
        return _report(score, batch)

    def _open_step(self, batch: "Batch", share: float, link: Link) -> Callable[[], StepReport]:
        (segment,) = self._segments
        fresh = self._fresh(batch)
        onward, boundary = dict[str, Tensor](), Boundary((), "")
        if fresh.samples:
            onward = self._model.travelling(fresh.inputs, self._route)
            boundary = self._leaving(segment, fresh, share)
        if not self._train:
            score = self._wait(lambda: link.evaluate(onward, boundary, batch.samples))
            return lambda: _report(score, batch)
        answered = self._wait(lambda: link.begin_step(onward, boundary, batch.samples, share))

        def end() -> StepReport:
            reply = self._wait(answered)
            self._behind = reply.norm
            if not self._frozen:
                self._tier.backward(boundary, reply.gradients)
            return StepReport(reply.loss, reply.n_targets, len(batch.samples))

        return end

    def _fresh(self, batch: "Batch") -> "Batch":
        """Return what of a mini-batch the next tier does not hold; it will from now on."""
        if not self._frozen:
            return batch
        rows = [row for row, sample in enumerate(batch.samples) if sample not in self._held]
        self._held |= set(batch.samples)
        inputs = {name: value[rows] for name, value in batch.inputs.items()}
        return replace(batch, inputs=inputs, samples=tuple(batch.samples[row] for row in rows))

    def _u_step(self, batch: "Batch", share: float, link: Link) -> StepReport:
        first, last = self._segments
        onward = self._model.travelling(batch.inputs, self._route)
        at_home = {**onward, "labels": batch.inputs["labels"]}
        boundary = self._leaving(first, batch, share)
        returned = self._wait(lambda: link.forward(onward, boundary, batch.samples, share))
        if not self._train:
            score = self._tier.evaluate(last, at_home, returned)
        else:
            score, gradients = self._tier.train_on(last, at_home, returned, share)
            leaving = compute(lambda: self._defence.gradients(gradients))
            back = self._wait(lambda: link.backward(leaving))
            self._behind = back.norm
            self._tier.backward(boundary, back.gradients)
        return _report(score, batch)

    def _leaving(self, segment: Segment, batch: "Batch", share: float) -> Boundary:
        """Return the boundary of `batch` as it may leave the device."""
        produced = self._tier.forward(segment, batch.inputs)
        return compute(lambda: self._defence.boundary(produced, batch.inputs, share))

    def _wait(self, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            return call()
        finally:
            self._link_s += time.perf_counter() - started


def _pixels(batches: "Iterable[Batch]") -> "tuple[Iterable[Batch], int | None]":
    """Return the batches, and the height and width of their images (None for texts)."""
    rest = iter(batches)
    first = list(islice(rest, 1))
    images = first[0].inputs.get("pixel_values") if first else None
    return chain(first, rest), None if images is None else images.shape[-1]


def _report(score: EvalReply, batch: "Batch") -> StepReport:
    return StepReport(
        score.loss, score.n_targets, len(batch.samples), score.n_correct, score.classes
    )
