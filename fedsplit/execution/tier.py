"""What one tier computes during a turn: its segments, one branch's adapters, an optimizer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fedsplit.errors import FedsplitError
from fedsplit.execution.lane import compute
from fedsplit.execution.optim import OptimizerSpec, State, put_state, state_of
from fedsplit.execution.padding import kept_of
from fedsplit.models import Boundary, Output, SplitModel
from fedsplit.models.names import SEQUENCES
from fedsplit.models.ranks import trained
from fedsplit.plan import Segment
from fedsplit.seeds import derive_seed
from fedsplit.transport import EvalReply, Gradients, LinkError

# How far the shares of a step's mini-batches may be from 1 in all, for rounding.
_SLACK = 1e-6


class Tier:
    """One branch's part of a model on one tier during one turn.

    Many tiers may share a model: each installs its own adapters before it runs. Methods run on the
    compute thread; between a `forward` and its `backward` other tiers may run.

    Parameters
    ----------
    model : SplitModel
        The backbone; holds `segments`.
    segments : sequence of Segment
        What this tier runs (two on the device of a U-shaped route).
    adapters : mapping of str to Tensor
        Values to start from, of any rank; names of other segments are left alone.
    optimizer : OptimizerSpec or None
        None for a turn that only evaluates.
    seed : int
        Seed of the turn.
    steps : int or None
        Mini-batches of the turn; needed where the learning rate follows a schedule.
    kept : mapping of str to State, optional
        What optimizers kept of parameters, to go on with.

    Raises
    ------
    FedsplitError
        If an adapter of the segments is missing or has another shape, or `steps` is needed.
    """

    def __init__(
        self,
        model: SplitModel,
        segments: Sequence[Segment],
        adapters: Mapping[str, Tensor],
        optimizer: OptimizerSpec | None,
        seed: int,
        steps: int | None = None,
        kept: Mapping[str, State] | None = None,
    ) -> None:
        self._model = model
        self._seed = seed
        self._step = 0
        self._spec = optimizer
        self._taken, self._share = 0, 0.0  # of the mini-batches since the last update
        self._updates = 0
        if optimizer is not None and optimizer.scheduled and steps is None:
            raise FedsplitError("steps: must be given, the learning rate follows a schedule")
        self._steps = steps
        self._parameters: dict[str, nn.Parameter] = {}
        for segment in segments:
            self._parameters |= model.trainable(segment, adapters)
        learning = [item for item in self._parameters.values() if item.requires_grad]
        self._names = [name for name, item in self._parameters.items() if item.requires_grad]
        self._optimizer = optimizer.build(learning) if optimizer and learning else None
        if self._optimizer is not None and kept:
            put_state(self._optimizer, self._names, kept)
        self._train = optimizer is not None
        drawn = optimizer is not None and optimizer.proximal_mu > 0
        self._start = [item.detach().clone() for item in learning] if drawn else []
        self._trained = learning

    @property
    def complete(self) -> bool:
        """Whether the mini-batches taken since the last update are all of the next one."""
        return self._share > 1 - _SLACK

    def take(self, share: float = 1.0) -> None:
        """Begin a mini-batch that has `share` of the targets of the update that it is for.

        Raises
        ------
        LinkError
            If the mini-batches of an update are more than planned, or their shares do not sum
            to 1.
        """
        assert self._spec is not None
        if self.complete:
            raise LinkError("norm: must come before the next step")
        self._taken += 1
        self._share += share
        most = self._spec.accumulate
        full = self._taken == most
        if self._share > 1 + _SLACK or (full and not self.complete):
            allowed = f"1 over {most} mini-batches at most"
            raise LinkError(f"shares={self._share:g} of {self._taken}: must sum to {allowed}")

    def require_whole(self) -> None:
        """Refuse to leave the turn within a step, or before a step's norm came.

        Raises
        ------
        LinkError
            If mini-batches were taken since the last update.
        """
        if self._taken:
            raise LinkError(f"close: must follow an update, {self._taken} mini-batches wait for it")

    def end(self) -> None:
        """End a mini-batch: the next one draws dropout of its own."""
        self._step += 1

    def adapters(self) -> dict[str, Tensor]:
        """Return copies of the present values, by name, on the host wherever they are trained.

        Residuals are not among them.
        """
        return compute(
            lambda: {
                name: item.detach().to("cpu", copy=True)
                for name, item in trained(self._parameters).items()
            }
        )

    def state(self) -> dict[str, State]:
        """Return copies of what the optimizer keeps of each parameter, by name, on the host."""
        optimizer = self._optimizer
        return {} if optimizer is None else compute(lambda: state_of(optimizer, self._names))

    def forward(
        self, segment: Segment, inputs: Mapping[str, Tensor], received: Boundary | None = None
    ) -> Boundary:
        """Run a `segment` that another follows, dropout drawn from (seed, step, segment).

        What nothing depends on is not among what is kept of it (`Boundary.kept`): padding, unless
        it was sent this far.
        """

        def run() -> Boundary:
            produced = self._forward(segment, inputs, received)
            assert isinstance(produced, Boundary)
            where = kept_of(self._model, segment, inputs) if received is None else received.where
            if where is None:
                return produced
            return replace(produced, kept=self._model.crossing(segment.stop).kept(where))

        return compute(run)

    def backward(
        self, produced: Boundary, gradients: Gradients, received: Boundary | None = None
    ) -> Gradients:
        """Send `gradients` back through what `forward` produced.

        Returns
        -------
        tuple of Tensor or None
            Gradients of the boundary that `forward` had `received`; None where not wanted.

        Raises
        ------
        FedsplitError
            If a gradient is not finite.
        """

        def run() -> Gradients:
            device = self._model.device
            if self._spec is not None and self._spec.checkpointing:
                self._enter()  # others may have run, and blocks are computed again
            produced.backward([None if item is None else item.to(device) for item in gradients])
            return self._collect(received)

        return compute(run)

    def train_on(
        self,
        segment: Segment,
        inputs: Mapping[str, Tensor],
        received: Boundary | None = None,
        share: float = 1.0,
    ) -> tuple[EvalReply, Gradients]:
        """Run a route's last `segment` forward and backward; raises and returns as the two.

        Gradients are those of `share` times the mean loss.

        Raises
        ------
        FedsplitError
            If the loss or a gradient is not finite.
        """

        def run() -> tuple[EvalReply, Gradients]:
            loss, score = self._score(segment, inputs, received)
            weighted = loss if share == 1 else loss * share
            weighted.backward()  # type: ignore[no-untyped-call]
            collected = self._collect(received, loss)
            return score(loss.item()), collected

        return compute(run)

    def evaluate(
        self, segment: Segment, inputs: Mapping[str, Tensor], received: Boundary | None = None
    ) -> EvalReply:
        """Run a route's last `segment`.

        Raises
        ------
        FedsplitError
            If the loss is not finite.
        """

        def run() -> EvalReply:
            loss, score = self._score(segment, inputs, received)
            return score(self._value(loss))

        return compute(run)

    def norm(self, behind: float | None = 0.0) -> float:
        """Return the norm of the gradients collected, here and on the tiers `behind`.

        Raises
        ------
        LinkError
            If those did not say theirs.
        FedsplitError
            If it is not finite.
        """
        if behind is None:
            raise LinkError("norm: must come with a step's gradients, where they are clipped")

        def run() -> float:
            self._draw_near()
            return float(get_total_norm([x.grad for x in self._trained if x.grad is not None]))

        norm = math.hypot(compute(run), behind)
        if not math.isfinite(norm):
            raise FedsplitError(f"norm of gradients={norm}: must be finite (step {self._step})")
        return norm

    def update(self, norm: float | None = None) -> None:
        """Apply the optimizer to the gradients collected, of this `norm` over all tiers.

        It must be given where gradients are clipped, as `norm` has to be asked for on every tier.
        """
        self._taken, self._share = 0, 0.0
        self._updates += 1
        if self._optimizer is not None:
            compute(lambda: self._update(norm))

    def _update(self, norm: float | None) -> None:
        assert self._optimizer is not None
        assert self._spec is not None
        spec = self._spec
        if spec.clip is None:
            self._draw_near()
        else:
            assert norm is not None
            clip_grads_with_norm_(self._trained, spec.clip, torch.tensor(norm))
        if spec.scheduled and self._steps is not None:
            rate = spec.rate(self._updates - 1, spec.updates(self._steps))
            for group in self._optimizer.param_groups:
                group["lr"] = rate
        self._optimizer.step()
        for parameter in self._trained:  # the optimizer's own way is measured by torch's profiler
            parameter.grad = None

    def _draw_near(self) -> None:
        """Add the gradient of FedProx's term."""
        mu = 0.0 if self._spec is None else self._spec.proximal_mu
        for parameter, start in zip(self._trained, self._start, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=mu)

    def _enter(self) -> None:
        """Have the model be this turn's: others that share it may have run since."""
        if self._model.training != self._train:  # a walk through all modules
            self._model.train(self._train)
        self._model.checkpointing = self._spec is not None and self._spec.checkpointing
        self._model.install(self._parameters)

    def _forward(
        self, segment: Segment, inputs: Mapping[str, Tensor], received: Boundary | None
    ) -> Boundary | Output:
        device = self._model.device
        if received is not None:
            moved = tuple(tensor.to(device) for tensor in received.tensors)
            received = replace(received, tensors=moved)
        self._enter()
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus), torch.set_grad_enabled(self._train):
            seed = dropout_seed(self._seed, self._step, segment)
            # `torch.manual_seed` looks for every kind of device each time.
            torch.default_generator.manual_seed(seed)
            if gpus:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            return self._model.run(segment, inputs, received)

    def _score(
        self, segment: Segment, inputs: Mapping[str, Tensor], received: Boundary | None
    ) -> tuple[Tensor, Callable[[float], EvalReply]]:
        """Return the loss with its graph, and the reply that says its value.

        Not the logits: they are too large to keep.
        """
        output = self._forward(segment, inputs, received)
        assert isinstance(output, Output)
        loss = output.loss
        if self._spec is not None and self._spec.label_smoothing:
            loss = _smoothed(output, inputs["labels"], self._spec.label_smoothing)
        labels = inputs["labels"]
        tokens = self._model.counts_tokens and not self._train
        correct = _count_correct(output, labels, tokens=tokens)
        classes = () if self._model.spec.task != SEQUENCES else _count_classes(output, labels)
        targets = output.n_targets
        return loss, partial(EvalReply, n_targets=targets, n_correct=correct, classes=classes)

    def _value(self, loss: Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise FedsplitError(f"loss={value}: must be finite (step {self._step})")
        return value

    def _collect(self, received: Boundary | None, loss: Tensor | None = None) -> Gradients:
        """Return the gradients of `received`; refuse any, or a `loss`, that is not finite."""
        collected = () if received is None else received.gradients()
        gradients = [item.grad for item in self._trained]
        present = [item for item in (*gradients, *collected) if item is not None]
        # Infinite or not a number if any value is, and seldom else; one number in place of many.
        # (The largest value would do as well, but takes a dozen times as long.)
        norm = get_total_norm(present) if present else None
        # Numbers are asked for only now: to know one of a GPU is to wait for all before it.
        if loss is not None:
            self._value(loss)
        if norm is not None and not math.isfinite(norm.item()):
            self._refuse_infinite(collected)
        return collected

    def _refuse_infinite(self, collected: Gradients) -> None:
        found = {f"gradient of {name}": item.grad for name, item in self._parameters.items()}
        found |= {f"gradient of boundary tensor {n}": item for n, item in enumerate(collected)}
        for name, item in found.items():
            if item is not None and not item.isfinite().all():
                raise FedsplitError(f"{name}: must be finite (step {self._step})")


def dropout_seed(seed: int, step: int, segment: Segment) -> int:
    """Return the seed of what `segment` draws in a step, different from any other segment's.

    Segments differ in where they start, but for embeddings alone on a tier and the block 0 behind
    them.
    """
    alone = ("embeddings",) if segment.stop == 0 else ()
    return derive_seed(seed, "dropout", step, segment.start, *alone)


def _count_correct(output: Output, labels: Tensor, *, tokens: bool) -> int | None:
    """Return how many images, or `tokens` if asked for, are predicted right; else None."""
    if output.logits is None or (output.logits.dim() != 2 and not tokens):
        return None
    found, labels = output.logits.argmax(-1), labels.to(output.logits.device)
    if output.logits.dim() == 3:
        found, labels = found[:, :-1], labels[:, 1:]  # a label that is ignored is below any token
    return int((found == labels).sum())


def _smoothed(output: Output, labels: Tensor, smoothing: float) -> Tensor:
    """Return the loss whose targets are spread over all labels, as transformers' Trainer does."""
    if output.logits is None:
        raise FedsplitError("label_smoothing: must be 0 for a model that gives no scores")
    scores, wanted = output.logits, labels.to(output.logits.device).long()
    if scores.dim() == 3:  # of tokens, each of which predicts the next
        scores, wanted = scores[:, :-1].flatten(0, 1), wanted[:, 1:].flatten()
    return cross_entropy(scores.float(), wanted, label_smoothing=smoothing)


def _count_classes(output: Output, labels: Tensor) -> tuple[int, ...]:
    """Return three numbers of each class; see `EvalReply`."""
    assert output.logits is not None
    said, n_classes = output.logits.argmax(-1).cpu(), output.logits.shape[-1]
    labels = labels.long().cpu()
    groups = (said[said == labels], said, labels[labels >= 0])
    counts = torch.stack([torch.bincount(group, minlength=n_classes) for group in groups], dim=1)
    return tuple(counts.flatten().tolist())
