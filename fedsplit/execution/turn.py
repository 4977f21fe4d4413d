"""One turn of one branch on a stage: what its link calls."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.execution.lane import FifoLock
from fedsplit.execution.optim import OptimizerSpec
from fedsplit.execution.tier import Tier
from fedsplit.models import Boundary, SplitModel
from fedsplit.transport import (
    EvalReply,
    Gradients,
    Link,
    LinkError,
    LinkStats,
    OpenRequest,
    StepReply,
)

WAITING, ACTIVE, DONE, FAILED = "waiting", "active", "done", "failed"


@dataclass(frozen=True)
class TurnStatus:
    """How a turn stands on a stage.

    Parameters
    ----------
    state : str
        "waiting" (its link has not been opened), "active", "done" or "failed".
    steps : int
        Mini-batches trained or evaluated.
    reason : str
        Why it failed.
    stats : LinkStats
        Bytes that the stage's own link to the next tier carried; known once "done".
    """

    state: str = WAITING
    steps: int = 0
    reason: str = ""
    stats: LinkStats = field(default_factory=LinkStats)


class StageTurn:
    """A `fedsplit.transport.Visit` that computes on a stage's model; made by `Stage.open_turn`.

    The lane is held from a step's forward to the end of its backward pass, over the wait for the
    next tier, or for the device of a U-shaped route, in between.
    """

    def __init__(
        self,
        model: SplitModel,
        lane: FifoLock,
        request: OpenRequest,
        adapters: Mapping[str, Tensor],
        optimizer: OptimizerSpec | None,
        downstream: tuple[Link, str] | None,
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
        self.tier = Tier(
            model, [self._segment], adapters, optimizer if request.train else None, request.seed
        )
        self._lane = lane
        self._holds_lane = False
        self._status_mutex = threading.Lock()
        self._calls = threading.RLock()  # one call at a time; the stage may end the turn meanwhile
        self._link: Link | None = None
        if downstream is not None:
            self._link, self._link_token = downstream
        self._pending: tuple[Boundary, Boundary] | None = None  # received, produced
        self._update_due = False

    def enter(self) -> None:
        """Make the turn active, once, and enter the turn on the next tier.

        Raises
        ------
        LinkError
            If it was entered before, or the next tier refuses.
        """
        with self._calls:
            if self.status.state != WAITING:
                raise LinkError(f"token: its turn is {self.status.state}, it opens only once")
            self._change_status(state=ACTIVE)
            if self._link is not None:
                onward = replace(
                    self.request, token=self._link_token, position=self.request.position + 1
                )
                try:
                    self._link.open(onward)
                except FedsplitError as error:
                    self.fail(str(error))
                    raise

    def step(
        self, inputs: Mapping[str, Tensor], boundary: Boundary, samples: Sequence[int]
    ) -> StepReply:
        """See `fedsplit.transport.Steps.step`."""
        with self._calls, self._lane_for_step():
            reply = self._step(inputs, boundary, samples)
            self._update_due = True
            return reply

    def forward(
        self, inputs: Mapping[str, Tensor], boundary: Boundary, samples: Sequence[int]
    ) -> Boundary:
        """See `fedsplit.transport.Steps.forward`."""
        with self._calls, self._lane_for_step(keep=self.request.train):
            onward = self._forward(inputs, boundary)
            if not self.request.train:
                self._count_step()
            return onward if self._link is None else self._link.forward(inputs, onward, samples)

    def backward(self, gradients: Gradients) -> Gradients:
        """See `fedsplit.transport.Steps.backward`."""
        with self._calls:
            self._require_active()
            try:
                if self._link is not None:
                    gradients = self._link.backward(gradients)
                self._update_due = True
                return self._backward(gradients)
            finally:
                self._pending = None
                self._release_lane()

    def evaluate(
        self, inputs: Mapping[str, Tensor], boundary: Boundary, samples: Sequence[int]
    ) -> EvalReply:
        """See `fedsplit.transport.Steps.evaluate`."""
        with self._calls, self._lane_for_step():
            self._count_step()
            return self._evaluate(inputs, boundary, samples)

    def settle(self) -> None:
        """See `fedsplit.transport.Visit.settle`."""
        with self._calls:
            if self._update_due:
                self._update_due = False
                self.tier.update()
                self._count_step()

    def finish(self) -> None:
        """See `fedsplit.transport.Visit.finish`."""
        with self._calls:
            self._require_active()
            stats = LinkStats() if self._link is None else self._link.close()
            self._change_status(state=DONE, stats=stats)

    def fail(self, reason: str) -> None:
        """See `fedsplit.transport.Visit.fail`."""
        # First, so that a call that waits for the next tier or the lane gives up.
        if not self._change_status(state=FAILED, reason=reason):
            return
        if self._link is not None:
            self._link.abort()
        with self._calls:
            self._pending = None
            self._release_lane()

    # The following hold a step's graph in their own variables only, so that its memory is free
    # again when the lane passes to another branch.

    def _step(
        self, inputs: Mapping[str, Tensor], boundary: Boundary, samples: Sequence[int]
    ) -> StepReply:
        if self._link is None:
            score, gradients = self.tier.train_on(self._segment, inputs, boundary)
            return StepReply(gradients, score.loss, score.n_targets)
        produced = self.tier.forward(self._segment, inputs, boundary)
        onward = self._link.step(inputs, produced, samples)
        return replace(onward, gradients=self.tier.backward(produced, onward.gradients, boundary))

    def _forward(self, inputs: Mapping[str, Tensor], boundary: Boundary) -> Boundary:
        produced = self.tier.forward(self._segment, inputs, boundary)
        if self.request.train:
            self._pending = (boundary, produced)
        leaves = (item.detach().requires_grad_(item.requires_grad) for item in produced.tensors)
        return Boundary(tuple(leaves), produced.layout)

    def _backward(self, gradients: Gradients) -> Gradients:
        if self._pending is None:
            raise LinkError("backward: must follow a forward")
        received, produced = self._pending
        self._pending = None
        return self.tier.backward(produced, gradients, received)

    def _evaluate(
        self, inputs: Mapping[str, Tensor], boundary: Boundary, samples: Sequence[int]
    ) -> EvalReply:
        if self._link is None:
            return self.tier.evaluate(self._segment, inputs, boundary)
        produced = self.tier.forward(self._segment, inputs, boundary)
        return self._link.evaluate(inputs, produced, samples)

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

    @contextmanager
    def _lane_for_step(self, keep: bool = False) -> Iterator[None]:
        """Hold the lane for the block, and beyond it (until its backward) if `keep`."""
        self._require_active()
        self._lane.acquire()
        self._holds_lane = True
        done = False
        try:
            self._require_active()
            yield
            done = True
        finally:
            if not (done and keep):
                self._release_lane()

    def _release_lane(self) -> None:
        if self._holds_lane:
            self._holds_lane = False
            self._lane.release()
