"""What one tier computes during a turn: its segments, one branch's adapters, an optimizer."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedsplit.errors import FedsplitError
from fedsplit.execution.lane import compute
from fedsplit.execution.optim import OptimizerSpec
from fedsplit.models import Boundary, Output, SplitModel
from fedsplit.models.names import SEQUENCES
from fedsplit.plan import Segment
from fedsplit.seeds import derive_seed
from fedsplit.transport import EvalReply, Gradients


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
        Values to start from; names of other segments are left alone.
    optimizer : OptimizerSpec or None
        None for a turn that only evaluates.
    seed : int
        Seed of the turn.

    Raises
    ------
    FedsplitError
        If an adapter of the segments is missing or has another shape.
    """

    def __init__(
        self,
        model: SplitModel,
        segments: Sequence[Segment],
        adapters: Mapping[str, Tensor],
        optimizer: OptimizerSpec | None,
        seed: int,
    ) -> None:
        self._model = model
        self._seed = seed
        self._step = 0
        self._parameters: dict[str, nn.Parameter] = {}
        for segment in segments:
            self._parameters |= model.trainable(segment)
        for name, parameter in self._parameters.items():
            _fill(name, parameter, adapters)
        trained = [item for item in self._parameters.values() if item.requires_grad]
        self._optimizer = optimizer.build(trained) if optimizer and trained else None
        self._train = optimizer is not None
        self._proximal_mu = optimizer.proximal_mu if optimizer else 0.0
        self._start = [item.detach().clone() for item in trained] if self._proximal_mu else []
        self._trained = trained

    def adapters(self) -> dict[str, Tensor]:
        """Return copies of the present values, by name."""
        return compute(
            lambda: {name: item.detach().clone() for name, item in self._parameters.items()}
        )

    def forward(
        self, segment: Segment, inputs: Mapping[str, Tensor], received: Boundary | None = None
    ) -> Boundary:
        """Run a `segment` that another follows, dropout drawn from (seed, step, segment)."""

        def run() -> Boundary:
            produced = self._forward(segment, inputs, received)
            assert isinstance(produced, Boundary)
            return produced

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
            device = self._model.model.device
            produced.backward([None if item is None else item.to(device) for item in gradients])
            return self._collect(received)

        return compute(run)

    def train_on(
        self, segment: Segment, inputs: Mapping[str, Tensor], received: Boundary | None = None
    ) -> tuple[EvalReply, Gradients]:
        """Run a route's last `segment` forward and backward; raises and returns as the two.

        Raises
        ------
        FedsplitError
            If the loss or a gradient is not finite.
        """

        def run() -> tuple[EvalReply, Gradients]:
            loss, score = self._score(segment, inputs, received)
            loss.backward()  # type: ignore[no-untyped-call]
            return score, self._collect(received)

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
        return compute(lambda: self._score(segment, inputs, received)[1])

    def update(self) -> None:
        """Apply the optimizer to the gradients collected, and go on to the next step."""
        self._step += 1
        if self._optimizer is not None:
            compute(self._update)

    def _update(self) -> None:
        assert self._optimizer is not None
        for parameter, start in zip(self._trained, self._start, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=self._proximal_mu)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _forward(
        self, segment: Segment, inputs: Mapping[str, Tensor], received: Boundary | None
    ) -> Boundary | Output:
        device = self._model.model.device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        if received is not None:
            moved = tuple(tensor.to(device) for tensor in received.tensors)
            received = Boundary(moved, received.layout)
        self._model.train(self._train)
        self._model.install(self._parameters)
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus), torch.set_grad_enabled(self._train):
            torch.manual_seed(dropout_seed(self._seed, self._step, segment))
            return self._model.run(segment, inputs, received)

    def _score(
        self, segment: Segment, inputs: Mapping[str, Tensor], received: Boundary | None
    ) -> tuple[Tensor, EvalReply]:
        """Return the loss with its graph, but not the logits: they are too large to keep."""
        output = self._forward(segment, inputs, received)
        assert isinstance(output, Output)
        loss = output.loss.item()
        if not math.isfinite(loss):
            raise FedsplitError(f"loss={loss}: must be finite (step {self._step}, {segment})")
        labels = inputs["labels"]
        correct = _count_correct(output, labels)
        classes = () if self._model.spec.task != SEQUENCES else _count_classes(output, labels)
        return output.loss, EvalReply(loss, output.n_targets, correct, classes)

    def _collect(self, received: Boundary | None) -> Gradients:
        """Return the gradients of `received`; refuse any that is not finite."""
        for name, parameter in self._parameters.items():
            self._check_finite(name, parameter.grad)
        if received is None:
            return ()
        collected = received.gradients()
        for index, gradient in enumerate(collected):
            self._check_finite(f"boundary tensor {index}", gradient)
        return collected

    def _check_finite(self, name: str, gradient: Tensor | None) -> None:
        if gradient is not None and not gradient.isfinite().all():
            raise FedsplitError(f"gradient of {name}: must be finite (step {self._step})")


def dropout_seed(seed: int, step: int, segment: Segment) -> int:
    """Return the seed of what `segment` draws in a step, different from any other segment's.

    Segments differ in where they start, but for embeddings alone on a tier and the block 0 behind
    them.
    """
    alone = ("embeddings",) if segment.stop == 0 else ()
    return derive_seed(seed, "dropout", step, segment.start, *alone)


def _count_correct(output: Output, labels: Tensor) -> int | None:
    """Return how many images are classified right; None where `output` is not a classifier's."""
    if output.logits is None or output.logits.dim() != 2:
        return None
    return int((output.logits.argmax(-1) == labels.to(output.logits.device)).sum())


def _count_classes(output: Output, labels: Tensor) -> tuple[int, ...]:
    """Return three numbers of each class; see `EvalReply`."""
    assert output.logits is not None
    said, n_classes = output.logits.argmax(-1).cpu(), output.logits.shape[-1]
    labels = labels.long().cpu()
    groups = (said[said == labels], said, labels[labels >= 0])
    counts = torch.stack([torch.bincount(group, minlength=n_classes) for group in groups], dim=1)
    return tuple(counts.flatten().tolist())


def _fill(name: str, parameter: nn.Parameter, adapters: Mapping[str, Tensor]) -> None:
    if name not in adapters:
        raise FedsplitError(f"adapters: {name!r} is missing")
    value = adapters[name]
    if value.shape != parameter.shape:
        raise FedsplitError(
            f"adapter {name!r}: shape={tuple(value.shape)} must be {tuple(parameter.shape)}"
        )
    with torch.no_grad():
        parameter.copy_(value)
