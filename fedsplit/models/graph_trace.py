"""What a model computes, operation by operation, watched on tensors without data.

The model runs forward and backward under `FakeTensorMode`: shapes and types are real, memory is
not taken, so that a model of any size is traced in seconds.
"""

import bisect
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.errors import FedsplitError, require
from fedsplit.models.operators import SHAPE_ONLY, flops_of, run_fake, tensors_in, written_by
from fedsplit.models.private import (
    GROUPED_MM,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    TorchDispatchMode,
)


@dataclass(kw_only=True)
class Operation:
    """One operation of the forward pass; costs are for the whole traced batch.

    `parents` and `parameters` index the trace's operations and parameters. `before` lists
    operations that read a tensor which this one overwrites. `is_view` marks an output that is a
    parent's memory, seen whole.
    """

    name: str
    block: int
    parents: set[int] = field(default_factory=set)
    parameters: set[int] = field(default_factory=set)
    before: set[int] = field(default_factory=set)
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    saved_bytes: float = 0.0
    output_bytes: float = 0.0
    gradient_bytes: float = 0.0
    is_input: bool = False
    is_view: bool = False
    differentiable: bool = False


@dataclass
class Parameter:
    """A parameter of the traced model; names that share memory are one parameter, the first."""

    name: str
    shape: tuple[int, ...]
    n_bytes: float
    trainable: bool


@dataclass
class Trace:
    """The operations of a forward pass in order, inputs first, and the parameters they use.

    `blocks` is the number of blocks, `boundaries[i]` the tensor that enters block `i` (on a device
    without data), the last entry the one that leaves the last block.
    """

    operations: list[Operation]
    parameters: list[Parameter]
    result: int
    blocks: int
    boundaries: list[Tensor | None]

    @property
    def boundary_bytes(self) -> list[float]:
        """Bytes of the boundaries."""
        return [0.0 if item is None else float(_bytes(item)) for item in self.boundaries]


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Return `model` with the same structure and tied weights, on tensors without data."""
    memo: dict[int, Any] = {}
    tensors = [*model.parameters(), *model.buffers()]
    with mode:
        for tensor in tensors:
            fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fake
    return copy.deepcopy(model, memo)


def trace(model: nn.Module, inputs: Mapping[str, Tensor], blocks: Sequence[str] = ()) -> Trace:
    """Return what `model` computes for `inputs`, forward and backward.

    Parameters
    ----------
    model : nn.Module
        Returns a scalar loss, or an output with one in ``.loss``. Its weights are not read: real
        and meta ones will do.
    inputs : mapping of str to Tensor
        Keyword arguments of the forward pass; only shapes and types matter.
    blocks : sequence of str
        Names of the modules that are the model's blocks, in order.

    Raises
    ------
    FedsplitError
        If the model returns no scalar loss, or its operations depend on the data.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_copy(model, mode)
    with mode:
        fake_inputs = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            for name, tensor in inputs.items()
        }
    recorder = Recorder(fake, fake_inputs, len(blocks))
    try:
        with ExitStack() as stack:
            for index, name in enumerate(blocks):
                stack.enter_context(recorder.block_hooks(fake.get_submodule(name), index))
            stack.enter_context(mode)
            with recorder.saving(), recorder:
                output = fake(**fake_inputs)
            loss = getattr(output, "loss", output)
            if not (isinstance(loss, Tensor) and loss.dim() == 0):
                raise FedsplitError(f"model={type(model).__name__!r}: must return a scalar loss")
            recorder.forward_done()
            if loss.requires_grad:
                with recorder:
                    loss.backward()  # type: ignore[no-untyped-call]
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        why = "" if GROUPED_MM is not None else "; models of experts need torch 2.8"
        raise FedsplitError(
            f"model={type(model).__name__!r}: what it computes depends on the data ({error}){why}"
        ) from error
    return recorder.finish(loss)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that reaches a device, and where its tensors came from."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], n_blocks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[Operation] = []
        self._kept: list[Tensor] = []  # keeps identities and storages from being used again
        self._producer: dict[int, int] = {}  # id of a tensor -> operation
        self._owner: dict[int, int] = {}  # storage -> operation that made or last changed it
        self._changed: set[int] = set()
        self._readers: dict[int, set[int]] = {}  # storage -> readers since its last change
        self._used: dict[tuple[int, int], Tensor] = {}  # (operation, id) of what is read later
        self._parameters: list[Parameter] = []
        self._parameter_of: dict[int, int] = {}
        self._weights: set[int] = set()
        self._forward = True
        self._block = -1
        self._boundaries: list[Tensor | None] = [None] * (n_blocks + 1)
        self._by_sequence: dict[int, int] = {}
        self._saved: dict[int, float] = {}
        self._saved_storages: set[int] = set()
        self._sequences: list[int] = []
        for name, weight in model.named_parameters():
            key = _storage(weight)
            self._weights.add(key)
            if key not in self._parameter_of:
                self._parameter_of[key] = len(self._parameters)
                shape, trainable = tuple(weight.shape), weight.requires_grad
                self._parameters.append(Parameter(name, shape, _bytes(weight), trainable))
        self._weights.update(_storage(buffer) for buffer in model.buffers())
        for name, tensor in inputs.items():
            self._operations.append(Operation(name=name, block=-1, is_input=True))
            self._produce(tensor, len(self._operations) - 1)

    @contextmanager
    def block_hooks(self, module: nn.Module, index: int) -> Iterator[None]:
        """Count what runs inside `module` to block `index`."""

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._block = index
            self._boundaries[index] = _first((args, kwargs))

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            self._block = index + 1
            self._boundaries[index + 1] = _first(output)

        handles = [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count what automatic differentiation saves, each piece of memory once."""

        def pack(tensor: Tensor) -> Tensor:
            key = _storage(tensor)
            if key not in self._weights and key not in self._saved_storages:
                self._saved_storages.add(key)
                self._kept.append(tensor)
                node = _newest_node()
                self._saved[node] = self._saved.get(node, 0.0) + tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = run_fake(func, args, kwargs)
        flops = flops_of(func, args, kwargs, output)
        if self._forward:
            self._note(func, args, kwargs, output, flops)
        elif flops:
            self._operations[self._current()].backward_flops += flops
        return output

    def _note(self, func: Any, args: Any, kwargs: Any, output: Any, flops: float) -> None:
        results = tensors_in(output)
        if not results:
            return
        reads = tensors_in((args, kwargs))
        operation = Operation(name=str(func._overloadpacket.__name__), block=self._block)
        index = len(self._operations)
        self._operations.append(operation)
        node = _newest_node()
        self._by_sequence.setdefault(node, index)
        operation.forward_flops += flops
        # Autograd marks its results only after this call, hence the question to the arguments.
        operation.differentiable |= torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in reads
        )
        for tensor in reads if func._overloadpacket not in SHAPE_ONLY else ():
            self._read(tensor, operation, index)
        written = written_by(func, args, kwargs)
        for tensor in written:
            key = _storage(tensor)
            operation.before |= self._readers.pop(key, set()) - {index}
            self._owner[key] = index
            self._changed.add(key)
        sources = {_storage(tensor): tensor for tensor in reads}
        operation.is_view = (
            not written
            and all(_storage(result) in sources for result in results)
            and sum(map(_bytes, results)) >= max(_bytes(sources[_storage(r)]) for r in results)
        )
        for result in results:
            self._produce(result, index)

    def _produce(self, tensor: Tensor, index: int) -> None:
        self._kept.append(tensor)
        self._producer[id(tensor)] = index
        self._owner.setdefault(_storage(tensor), index)

    def _read(self, tensor: Tensor, operation: Operation, index: int) -> None:
        key = _storage(tensor)
        if key in self._parameter_of:
            operation.parameters.add(self._parameter_of[key])
        source = self._source(tensor)
        if source is None or source == index:
            return
        operation.parents.add(source)
        self._readers.setdefault(key, set()).add(index)
        self._used[source, id(tensor)] = tensor

    def _source(self, tensor: Tensor) -> int | None:
        """Return the operation that `tensor` comes from; None for weights and constants."""
        key = _storage(tensor)
        source = self._producer.get(id(tensor), self._owner.get(key))
        if key in self._changed and source is not None:
            source = max(source, self._owner[key])
        return source

    def forward_done(self) -> None:
        """Turn from the forward to the backward pass."""
        self._forward = False
        for (index, _), tensor in self._used.items():
            source = self._operations[index]
            size = float(_bytes(tensor))
            source.output_bytes += size
            source.gradient_bytes += size if tensor.requires_grad else 0.0
        self._sequences = sorted(self._by_sequence)
        for node, size in self._saved.items():
            self._operations[self._nearest(node)].saved_bytes += size

    def _nearest(self, node: int) -> int:
        """Return the operation whose node in the autograd graph is `node`, or the last before."""
        position = max(bisect.bisect_right(self._sequences, node) - 1, 0)
        return self._by_sequence[self._sequences[position]]

    def _current(self) -> int:
        """Return the operation whose gradient is being computed."""
        node: Any = torch._C._current_autograd_node()
        return len(self._operations) - 1 if node is None else self._nearest(node._sequence_nr())

    def finish(self, loss: Tensor) -> Trace:
        """Return what was recorded."""
        source = self._source(loss)
        require(source is not None, "loss", "constant", "a function of the inputs")
        return Trace(
            self._operations,
            self._parameters,
            source or 0,
            len(self._boundaries) - 1,
            self._boundaries,
        )


def _newest_node() -> int:
    return int(torch.autograd._get_sequence_nr()) - 1  # type: ignore[attr-defined]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _first(tree: Any) -> Tensor | None:
    return next(iter(tensors_in(tree)), None)
