"""What a server sees of a device: a real turn, over a link that keeps all that arrives."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsplit.data import Batch
from fedsplit.errors import FedsplitError
from fedsplit.execution import (
    OptimizerSpec,
    Stage,
    TurnResult,
    compute,
    evaluate_turn,
    train_turn,
)
from fedsplit.models import Arrival, Boundary, SplitModel
from fedsplit.plan import CodecPlan, Route
from fedsplit.privacy import Observed, PrivacySpec
from fedsplit.transport import (
    EvalReply,
    Gradients,
    InProcessLink,
    OpenRequest,
    TurnBounds,
    new_token,
)

_BOUNDS = TurnBounds(samples=1 << 12, tokens=1 << 16)


@dataclass(frozen=True, kw_only=True)
class Sender:
    """A device as it is configured: all that decides what it sends.

    Parameters
    ----------
    model : SplitModel
        Holds the device's segments, and for `returned` all of them.
    route : Route
        Where it is cut.
    codec : CodecPlan
        How boundaries travel.
    privacy : PrivacySpec
        What is done to them first.
    adapters : mapping of str to Tensor
        Values of the adapters in the device's segments, and for `returned` of all.
    """

    model: SplitModel
    route: Route
    codec: CodecPlan
    privacy: PrivacySpec
    adapters: Mapping[str, Tensor]

    def observe(self, batches: Iterable[Batch], seed: int) -> tuple[Observed, Tensor]:
        """Return what crosses the first cut of texts, and which of their tokens go along as labels.

        The device's half of an evaluation runs, up to the frames and out of them again; nothing
        answers it behind the cut. Labels, if they travel, are of the shape of `Observed.tokens`,
        and -1 where none tells a token.

        Raises
        ------
        FedsplitError
            If nothing that crosses is of the shape ``[samples, tokens, width]``.
        """
        first = self.route.segments[0].stop
        cut = Route.two_tier(self.model.n_blocks, first)
        kept: list[tuple[dict[str, Tensor], Boundary]] = []
        request = OpenRequest(new_token(), cut, 1, self.codec, seed, train=False, bounds=_BOUNDS)
        texts = list(batches)
        evaluate_turn(
            self.model,
            cut,
            texts,
            adapters=self.adapters,
            seed=seed,
            link=InProcessLink(_Silent(self.model, request, kept)),
            token=request.token,
            codec=self.codec,
            privacy=self.privacy,
        )
        vectors, tokens, told, lengths = [], [], [], []
        for batch, (inputs, boundary) in zip(texts, kept, strict=True):
            ids = batch.inputs["input_ids"]
            mask = inputs["attention_mask"].bool()
            vectors.append(_by_token(boundary, mask))
            tokens.append(ids[mask])
            told.append(_told(inputs, self.model.spec.task, self.route, ids)[mask])
            lengths += mask.sum(1).tolist()
        observed = Observed(torch.cat(vectors), torch.cat(tokens), tuple(lengths))
        return observed, torch.cat(told)

    def returned(
        self, batches: Sequence[Batch], optimizer: OptimizerSpec, seed: int
    ) -> list[tuple[Boundary, Gradients]]:
        """Train a turn on a U-shaped route; return what went home and the gradient that came back.

        One pair for each of `batches`, as the server has them.
        """
        tap, _ = self._turn(batches, optimizer, seed)
        return list(zip(tap.sent, tap.came, strict=True))

    def trained(
        self, batches: Sequence[Batch], optimizer: OptimizerSpec, seed: int
    ) -> dict[str, Tensor]:
        """Train a turn; return the adapters that the device hands back."""
        return self._turn(batches, optimizer, seed)[1].adapters

    def _turn(
        self, batches: Sequence[Batch], optimizer: OptimizerSpec, seed: int
    ) -> "tuple[_Tap, TurnResult]":
        stage = Stage(self.model)
        token = new_token()
        # All servers as one: what goes home and what comes back is the same.
        n_blocks, ends = self.model.n_blocks, (self.route.cuts[0], self.route.cuts[-1])
        home = self.route.returns_home
        route = Route.u_shaped(n_blocks, *ends) if home else Route.two_tier(n_blocks, ends[0])
        request = OpenRequest(token, route, 1, self.codec, seed, train=True, bounds=_BOUNDS)
        stage.open_turn(request, optimizer=optimizer, downstream=None)
        stage.supply(token, self.adapters, None)
        tap = _Tap(stage)
        result = train_turn(
            self.model,
            route,
            batches,
            adapters=self.adapters,
            optimizer=optimizer,
            seed=seed,
            steps=len(batches),
            link=InProcessLink(tap),
            token=token,
            codec=self.codec,
            privacy=self.privacy,
        )
        stage.close_turn(token)
        return tap, result

    def tail(self, inputs: Mapping[str, Tensor], like: Boundary) -> Callable[[Tensor], Tensor]:
        """Return what follows the servers on the device, as the server itself can run it."""
        segment = self.route.segments[-1]
        onward = self.model.travelling(inputs, self.route)
        # Labels are needed to run a head, but what it says does not depend on them.
        blank = {**onward, "labels": torch.zeros_like(inputs["labels"])}

        def scores(boundary: Tensor) -> Tensor:
            first = boundary.to(like.tensors[0].dtype)
            received = Boundary((first, *like.tensors[1:]), like.layout)
            found = compute(lambda: self.model.run(segment, blank, received))
            logits: Tensor = found.logits  # type: ignore[union-attr,assignment]
            return logits

        return scores


def _by_token(boundary: Boundary, mask: Tensor) -> Tensor:
    """Return what a boundary says of each token, side by side: ``[positions, width]``."""
    parts = [
        tensor[mask].float()
        for tensor in boundary.tensors
        if tensor.is_floating_point() and tensor.dim() == 3 and tensor.shape[:2] == mask.shape
    ]
    if not parts:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in boundary.tensors)
        raise FedsplitError(f"boundary shapes {shapes}: must hold a vector for each token")
    return torch.cat(parts, 1)


def _told(inputs: Mapping[str, Tensor], task: str, route: Route, ids: Tensor) -> Tensor:
    """Return the tokens that the server is simply told, -1 elsewhere."""
    nothing = torch.full_like(ids, -1)
    if "input_ids" in inputs:
        return inputs["input_ids"].long()
    labels = inputs.get("labels")
    if route.returns_home or labels is None or task != "causal-lm":
        return nothing
    return torch.where(labels >= 0, labels.long(), nothing)


class _Silent:
    """A tier that keeps what arrives and computes nothing of it."""

    def __init__(
        self,
        model: SplitModel,
        request: OpenRequest,
        kept: list[tuple[dict[str, Tensor], Boundary]],
    ) -> None:
        self.request = request
        self._kept = kept
        self.arrival: Arrival = compute(lambda: model.arrival(request.route, request.position))

    def enter(self, token: bytes) -> Any:
        """See `fedsplit.transport.Host`."""
        return self

    def evaluate(
        self, inputs: Mapping[str, Tensor], boundary: Boundary, samples: Sequence[int]
    ) -> EvalReply:
        """See `fedsplit.transport.Steps.evaluate`."""
        copies = tuple(tensor.clone() for tensor in boundary.tensors)
        here = {name: value.clone() for name, value in inputs.items()}
        self._kept.append((here, Boundary(copies, boundary.layout)))
        return EvalReply(0.0, 0, None)

    def on_failure(self, call: Callable[[], None]) -> None:
        """See `fedsplit.transport.Visit.on_failure`."""

    def settle(self) -> None:
        """See `fedsplit.transport.Visit.settle`."""

    def finish(self) -> None:
        """See `fedsplit.transport.Visit.finish`."""

    def fail(self, reason: str) -> None:
        """See `fedsplit.transport.Visit.fail`."""


class _Tap:
    """A stage and, once entered, a visit to it; keeps what goes home and what comes back."""

    def __init__(self, stage: Stage) -> None:
        self._there: Any = stage
        self.sent: list[Boundary] = []
        self.came: list[Gradients] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._there, name)

    def enter(self, token: bytes) -> Any:
        """See `fedsplit.transport.Host`."""
        self._there = self._there.enter(token)
        return self

    def forward(self, *arguments: Any) -> Boundary:
        """See `fedsplit.transport.Steps.forward`."""
        onward: Boundary = self._there.forward(*arguments)
        self.sent.append(onward.detach())
        return onward

    def backward(self, gradients: Gradients) -> Any:
        """See `fedsplit.transport.Steps.backward`."""
        self.came.append(tuple(None if item is None else item.clone() for item in gradients))
        return self._there.backward(gradients)
