"""How much memory a model's tensors take at a time, watched on tensors without data."""

import bisect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsplit.models.graph_trace import fake_copy
from fedsplit.models.operators import run_fake
from fedsplit.models.private import FakeTensorMode, TorchDispatchMode, tree_leaves


def peak_bytes(
    model: nn.Module, inputs: Mapping[str, Tensor], blocks: Sequence[str]
) -> list[float]:
    """Return the most memory that tensors take while each unit of `model` computes.

    Forward or backward, for the whole batch; weights, their gradients and inputs not counted.
    Units are what comes before the first block, the blocks, and what comes after the last.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_copy(model, mode)
    with mode:
        fake_inputs = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            for name, tensor in inputs.items()
        }
    held = [*fake.parameters(), *fake.buffers(), *fake_inputs.values()]
    watch = _Live(len(blocks) + 2, {tensor.untyped_storage()._cdata for tensor in held})
    for parameter in fake.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
    for unit, name in enumerate(blocks, start=1):
        block = fake.get_submodule(name)
        block.register_forward_pre_hook(lambda *_, unit=unit: watch.enter(unit))
        block.register_forward_hook(lambda *_, unit=unit: watch.enter(unit + 1))
    with mode, watch:
        output = fake(**fake_inputs)
        loss = getattr(output, "loss", output)
        if loss.requires_grad:
            watch.turn_back(output)
            loss.backward()
    return watch.peaks


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that are alive, and notes the peak of every unit."""

    def __init__(self, n_units: int, ignored: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peaks = [0.0] * n_units
        self._backward = False
        self._output = 0
        self._live = 0
        self._known = ignored
        self._unit = 0
        self._starts = [0]  # position in the order of autograd's nodes where each unit starts
        self._units = [0]

    def enter(self, unit: int) -> None:
        """Count from here on to `unit`."""
        self._unit = unit
        self._starts.append(int(torch.autograd._get_sequence_nr()))  # type: ignore[attr-defined]
        self._units.append(unit)

    def turn_back(self, output: Any) -> None:
        """Begin the backward pass; `output` stays in the hands of who called the last unit."""
        leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
        storages = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
        self._output = sum({item._cdata: item.nbytes() for item in storages}.values())
        self._backward = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = run_fake(func, args, kwargs or {})
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        node: Any = torch._C._current_autograd_node() if self._backward else None
        # Gradients of weights are added up by nodes that stand outside of the order.
        if node is not None and node._sequence_nr() < 2**63:
            self._unit = self._units[bisect.bisect_right(self._starts, node._sequence_nr()) - 1]
        last = self._unit == len(self.peaks) - 1
        taken = self._live if last else self._live - self._output
        self.peaks[self._unit] = max(self.peaks[self._unit], float(taken))
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self._live += storage.nbytes()
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size
