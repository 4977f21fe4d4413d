"""A model in a single process, what crosses its cuts through a codec's real bytes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fedsplit.codec import Loopback, straight_through
from fedsplit.data import Batch, Samples, batches
from fedsplit.execution import OptimizerSpec
from fedsplit.models import Boundary, Output, SplitModel
from fedsplit.plan import Route
from fedsplit.privacy import Defence


def first_part(model: SplitModel, route: Route, inputs: Mapping[str, Tensor]) -> Boundary:
    """Return what leaves the device's part of `model`."""
    boundary = model.run(route.segments[0], inputs)
    assert isinstance(boundary, Boundary)
    return boundary


def second_part(
    model: SplitModel, route: Route, inputs: Mapping[str, Tensor], boundary: Boundary
) -> Output:
    """Return what the server's part makes of `boundary`."""
    output = model.run(route.segments[1], model.travelling(inputs, route), boundary)
    assert isinstance(output, Output)
    return output


def train_coded(
    model: SplitModel,
    route: Route,
    batches: Iterable[Batch],
    *,
    ways: Sequence[tuple[Loopback, Loopback]],
    optimizer: OptimizerSpec,
    rate: Callable[[int], float],
    defence: Defence | None = None,
    frozen: bool = False,
) -> int:
    """Train with the boundary and its gradient at every cut of `route` through one of `ways` each.

    The first boundary passes the device's `defence` before, if it has one. A `frozen` device only
    infers. At step `i` the optimizer's learning rate is multiplied by ``rate(i)``.

    Returns
    -------
    int
        Bytes of an element of the first boundary; 0 without a batch.
    """
    parameters = {
        name: parameter
        for segment in route.segments[frozen:]
        for name, parameter in model.trainable(segment).items()
    }
    model.install(parameters)
    stepper = optimizer.build(parameters.values())
    schedule = LambdaLR(stepper, rate)
    itemsize = 0
    model.train()
    for batch in batches:
        if frozen:
            model.eval()
        with torch.set_grad_enabled(not frozen):
            boundary = first_part(model, route, batch.inputs)
        if frozen:
            model.train()
        if defence is not None:
            boundary = defence.boundary(boundary, batch.inputs)
        itemsize = boundary.tensors[0].element_size()
        later = {"labels": batch.inputs["labels"], **model.travelling(batch.inputs, route)}
        stepper.zero_grad()
        for segment, way in zip(route.segments[1:], ways, strict=True):
            crossed = tuple(straight_through(x, *way, batch.samples) for x in boundary.tensors)
            output = model.run(segment, later, Boundary(crossed, boundary.layout))
            if isinstance(output, Boundary):
                boundary = output
        assert isinstance(output, Output)
        output.loss.backward()  # type: ignore[no-untyped-call]
        stepper.step()
        schedule.step()
    return itemsize


def evaluate_coded(
    model: SplitModel,
    route: Route,
    samples: Samples,
    batch_size: int,
    *,
    limit: int | None = None,
    way: tuple[Defence, Loopback] | None = None,
) -> tuple[float, float]:
    """Return the mean loss per target and the share of labels that come first.

    Of all samples, or of the mini-batches that begin before `limit`; boundaries pass a device's
    defence and codec if there is a `way`. Where labels are not one for each sample, the share is 0.
    """
    total, n_targets, hits = 0.0, 0, 0
    model.eval()
    n_batches = None if limit is None else -(-limit // batch_size)
    with torch.no_grad():
        for batch in islice(batches(samples, batch_size), n_batches):
            boundary = first_part(model, route, batch.inputs)
            if way is not None:
                defence, codec = way
                boundary = defence.boundary(boundary, batch.inputs)
                sent = tuple(codec.send(tensor, batch.samples) for tensor in boundary.tensors)
                boundary = Boundary(sent, boundary.layout)
            output = second_part(model, route, batch.inputs, boundary)
            total += output.loss.item() * output.n_targets
            n_targets += output.n_targets
            labels = batch.inputs["labels"]
            if labels.ndim == 1 and output.logits is not None:
                hits += int((output.logits.argmax(-1) == labels).sum())
    return total / n_targets, hits / n_targets
