"""One turn of one branch on a stage: what its link calls."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.execution.lane import Places, compute
from fedsplit.execution.optim import OptimizerSpec, State
from fedsplit.execution.status import ACTIVE, DONE, FAILED, WAITING, TurnStatus
from fedsplit.execution.tier import Tier
from fedsplit.models import Arrival, Boundary, SplitModel
from fedsplit.models.ranks import trained
from fedsplit.transport import (
    BackwardReply,
    EvalReply,
    Gradients,
    Link,
    LinkError,
    LinkStats,
    OpenRequest,
    StepReply,
    take_adapters,
)

# How far the norm over all tiers may be below that of some, for rounding.
_ROUNDING = 1e-9


class StageTurn:
    """A `fedsplit.transport.Visit` that computes on a stage's model; made by `Stage.open_turn`.

    A step that waits between its forward and its backward pass, for the next tier or for the device
    of a U-shaped route, holds one of `places` from before the one until after the other.
    """

    def __init__(
        self,
        model: SplitModel,
        places: Places,
        request: OpenRequest,
        optimizer: OptimizerSpec | None,
        downstream: tuple[Link, str] | None,
        supply_timeout_s: float,
        kept: Mapping[str, State] | None = None,
    ) -> None:
        route = request.route
        self.request = request
        self.status = TurnStatus()
        self._segment = route.segments[request.position]
        servers = len(route.segments) - route.returns_home
        if (request.position + 1 < servers) != (downstream is not None):
            raise FedsplitError(
                f"downstream: must be given if a server follows {self._segment} in {route}, "
                "and only then"
            )
        if request.train and optimizer is None:
            raise FedsplitError("optimizer: must be given for a turn that trains")
        self._model = model
        self._optimizer = optimizer if request.train else None
        self._kept = kept
        self._supplied = threading.Event()  # also set when the turn fails, to end the wait for it
        self._tier: Tier | None = None
        self._device_adapters: Mapping[str, Tensor] = {}
        self._handed_up: dict[str, Tensor] = {}
        self._supply_timeout_s = supply_timeout_s
        self._places = places
        self._has_place = False
        self._status_mutex = threading.Lock()
        self._on_failure: list[Callable[[], None]] = []
        self._calls = threading.RLock()  # one call at a time; the stage may end the turn meanwhile
        self._arrival: Arrival | None = None
        self._link: Link | None = None
        if downstream is not None:
            self._link, self._link_token = downstream
        self._pending: tuple[Boundary, Boundary] | None = None  # received, produced
        self._batch_due = False  # a mini-batch went through, which `settle` counts
        self._norm: float | None = None  # of a step that waits for the norm over all tiers

    def supply(self, adapters: Mapping[str, Tensor], device_adapters: Mapping[str, Tensor]) -> None:
        """Give the turn the adapters to start from, and those that its device is to fetch.

        Raises
        ------
        FedsplitError
            If it has them already, or one of the segment's is missing or has another shape.
        """
        if self._tier is not None:
            raise FedsplitError("adapters: were supplied to this turn before")
        if device_adapters and not self.request.adapters_on_link:
            raise FedsplitError("adapters_on_link=False: must be True for a device to fetch any")
        self._device_adapters = dict(device_adapters)
        seed, steps = self.request.seed, self.request.bounds.steps
        self._tier = Tier(
            self._model, [self._segment], adapters, self._optimizer, seed, steps, self._kept
        )
        self._supplied.set()

    def adapters(self) -> dict[str, Tensor]:
        """Return the segment's adapters, and those that the device handed up.

        Raises
        ------
        FedsplitError
            If the turn is not done.
        """
        if self.status.state != DONE or self._tier is None:
            raise FedsplitError(f"turn={self.status.state!r}: must be done ({self.status.reason})")
        return self._tier.adapters() | self._handed_up

    def state(self) -> dict[str, State]:
        """Return what the optimizer keeps of each of the segment's parameters, by name."""
        return {} if self._tier is None else self._tier.state()

    def enter(self) -> None:
        """Make the turn active, once, and enter the turn on the next tier.

        Raises
        ------
        LinkError
            If it was entered before, or the next tier refuses.
        """
        with self._call():
            if self.status.state != WAITING:
                raise LinkError(f"token: its turn is {self.status.state}, it opens only once")
            self._change_status(state=ACTIVE)
            route, position = self.request.route, self.request.position
            pixels = self.request.bounds.pixels
            self._arrival = compute(lambda: self._model.arrival(route, position, pixels))
            if self._link is not None:
                returning = None
                if route.returns_home:
                    cut = route.segments[-1].start
                    returning = compute(lambda: self._model.crossing(cut, pixels))
                onward = replace(
                    self.request,
                    token=self._link_token,
                    position=position + 1,
                    adapters_on_link=False,
                    held=None,
                )
                try:
                    self._link.open(onward, returning)
                except FedsplitError as error:
                    self.fail(str(error))
                    raise

    @property
    def arrival(self) -> Arrival:
        """See `fedsplit.transport.Visit.arrival`."""
        if self._arrival is None:
            raise LinkError("turn: must be entered first")
        return self._arrival

    def on_failure(self, call: Callable[[], None]) -> None:
        """See `fedsplit.transport.Visit.on_failure`."""
        with self._status_mutex:
            if self.status.state != FAILED:
                self._on_failure.append(call)
                return
        call()

    def fetch(self) -> Mapping[str, Tensor]:
        """See `fedsplit.transport.Visit.fetch`."""
        with self._call():
            self._my_tier()
            return self._device_adapters

    def hand_up(self, adapters: Mapping[str, Tensor]) -> None:
        """See `fedsplit.transport.Visit.hand_up`."""
        with self._call():
            self._require_active()
            take_adapters(adapters, trained(self._device_adapters), self._handed_up)

    def step(
        self,
        inputs: Mapping[str, Tensor],
        boundary: Boundary,
        samples: Sequence[int],
        share: float = 1.0,
    ) -> StepReply:
        """See `fedsplit.transport.Steps.step`."""
        with self._call(), self._place_for_step(self._link is not None):
            self._my_tier().take(share)
            reply = self._step(inputs, boundary, samples, share)
            self._batch_due = True
            return replace(reply, norm=self._norm_with(reply.norm))

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        boundary: Boundary,
        samples: Sequence[int],
        share: float = 1.0,
    ) -> Boundary:
        """See `fedsplit.transport.Steps.forward`."""
        train = self.request.train
        with self._call(), self._place_for_step(train, keep=train):
            if train:
                self._my_tier().take(share)
            else:
                self._count_step()
            onward, link = self._forward(inputs, boundary), self._link
            return onward if link is None else link.forward(inputs, onward, samples, share)

    def backward(self, gradients: Gradients) -> BackwardReply:
        """See `fedsplit.transport.Steps.backward`."""
        with self._call():
            self._require_active()
            try:
                reply = BackwardReply(gradients, 0.0)
                if self._link is not None:
                    reply = self._link.backward(gradients)
                self._batch_due = True
                returned = self._backward(reply.gradients)
                return BackwardReply(returned, self._norm_with(reply.norm))
            finally:
                self._pending = None
                self._leave_place()

    def update(self, norm: float) -> None:
        """See `fedsplit.transport.Steps.update`."""
        with self._call():
            self._require_active()
            least, self._norm = self._norm, None
            if least is None or norm < least * (1 - _ROUNDING):
                due = "absent, no step waits for it" if least is None else f"at least {least:g}"
                raise LinkError(f"norm={norm:g}: must be {due}")
            self._my_tier().update(norm)
            if self._link is not None:
                self._link.update(norm)

    def evaluate(
        self, inputs: Mapping[str, Tensor], boundary: Boundary, samples: Sequence[int]
    ) -> EvalReply:
        """See `fedsplit.transport.Steps.evaluate`."""
        with self._call(), self._place_for_step(False):
            self._count_step()
            return self._evaluate(inputs, boundary, samples)

    def settle(self) -> None:
        """See `fedsplit.transport.Visit.settle`."""
        with self._call():
            if self._batch_due:
                self._batch_due = False
                tier = self._my_tier()
                tier.end()
                if tier.complete and self._norm is None:
                    tier.update()
                self._count_step()

    def finish(self) -> None:
        """See `fedsplit.transport.Visit.finish`."""
        with self._call():
            self._my_tier().require_whole()
            self._require_planned_steps()
            missing = trained(self._device_adapters).keys() - self._handed_up.keys()
            if self.request.handed_up and missing:
                raise LinkError(f"adapters: must be handed up with {min(missing)!r} before close")
            stats = LinkStats() if self._link is None else self._link.close()
            self._change_status(state=DONE, stats=stats)
            self._on_failure = []

    def fail(self, reason: str) -> None:
        """See `fedsplit.transport.Visit.fail`."""
        # First, so that a call gives up that waits for adapters, a place or the next tier.
        if not self._change_status(state=FAILED, reason=reason):
            return
        self._supplied.set()
        self._places.look_again()
        if self._link is not None:
            self._link.abort()
        with self._status_mutex:
            calls, self._on_failure = self._on_failure, []
        for call in calls:
            call()
        self._put_away()

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Keep other calls out, but not `fail`: what it would put away is then left to us."""
        try:
            with self._calls:
                yield
        finally:
            self._put_away()

    def _put_away(self) -> None:
        """Let go of what a failed turn holds, unless a call is in progress, which does it."""
        if self.status.state == FAILED and self._calls.acquire(blocking=False):
            try:
                self._pending = None
                self._leave_place()
            finally:
                self._calls.release()

    # The following hold a step's graph in their own variables only, so that its memory is free
    # again when others compute.

    def _step(
        self,
        inputs: Mapping[str, Tensor],
        boundary: Boundary,
        samples: Sequence[int],
        share: float,
    ) -> StepReply:
        tier = self._my_tier()
        if self._link is None:
            score, gradients = tier.train_on(self._segment, inputs, boundary, share)
            return StepReply(gradients, score.loss, score.n_targets, 0.0)
        produced = tier.forward(self._segment, inputs, boundary)
        onward = self._link.step(inputs, produced, samples, share)
        return replace(onward, gradients=tier.backward(produced, onward.gradients, boundary))

    def _forward(self, inputs: Mapping[str, Tensor], boundary: Boundary) -> Boundary:
        produced = self._my_tier().forward(self._segment, inputs, boundary)
        if self.request.train:
            self._pending = (boundary, produced)
        leaves = (item.detach().requires_grad_(item.requires_grad) for item in produced.tensors)
        return replace(produced, tensors=tuple(leaves))

    def _backward(self, gradients: Gradients) -> Gradients:
        if self._pending is None:
            raise LinkError("backward: must follow a forward")
        received, produced = self._pending
        self._pending = None
        return self._my_tier().backward(produced, gradients, received)

    def _evaluate(
        self, inputs: Mapping[str, Tensor], boundary: Boundary, samples: Sequence[int]
    ) -> EvalReply:
        if self._link is None:
            return self._my_tier().evaluate(self._segment, inputs, boundary)
        produced = self._my_tier().forward(self._segment, inputs, boundary)
        return self._link.evaluate(inputs, produced, samples)

    def _norm_with(self, behind: float | None) -> float | None:
        """Return the norm of a whole step's gradients, here and `behind`, if they are clipped."""
        tier = self._my_tier()
        if self._optimizer is not None and self._optimizer.clip is not None and tier.complete:
            self._norm = tier.norm(behind)
        return self._norm

    def _my_tier(self) -> Tier:
        """Return the segment with its adapters; wait for them if they are still to come."""
        in_time = self._supplied.wait(self._supply_timeout_s)
        self._require_active()
        if not in_time or self._tier is None:
            raise LinkError(f"adapters: were not supplied within {self._supply_timeout_s:g} s")
        return self._tier

    def _require_active(self) -> None:
        if self.status.state != ACTIVE:
            raise LinkError(f"turn: is {self.status.state} {self.status.reason}".rstrip())

    def _change_status(self, **changes: Any) -> bool:
        """Change the status, unless the turn is over; return whether it was not."""
        with self._status_mutex:
            if self.status.state in (DONE, FAILED):
                return False
            self.status = replace(self.status, **changes)
            return True

    def _count_step(self) -> None:
        self._change_status(steps=self.status.steps + 1)

    def _require_planned_steps(self) -> None:
        """Refuse to end a turn of another number of steps than was planned for it."""
        steps, planned = self.status.steps, self.request.bounds.steps
        if planned is None or steps == planned or (not self.request.train and 0 < steps < planned):
            return
        allowed = f"{planned}" if self.request.train else f"1 to {planned}"
        raise LinkError(f"steps={steps}: must be {allowed} at the turn's end, as was planned")

    @contextmanager
    def _place_for_step(self, waits: bool, keep: bool = False) -> Iterator[None]:
        """Hold a place for the block if its step `waits`, and beyond it if it is to `keep` it."""
        self._my_tier()
        planned = self.request.bounds.steps
        if planned is not None and self.status.steps >= planned:
            raise LinkError(f"steps={planned + 1}: must be at most {planned}, as was planned")
        if waits:
            self._has_place = self._places.take(lambda: self.status.state == ACTIVE)
        done = False
        try:
            self._require_active()
            yield
            done = True
        finally:
            if not (done and keep):
                self._leave_place()

    def _leave_place(self) -> None:
        if self._has_place:
            self._has_place = False
            self._places.give_back()
