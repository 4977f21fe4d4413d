"""Where in a model each parameter is used, and which outputs of its blocks matter.

Found by watching one forward pass of a narrow twin, not by knowing architectures.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from fedsplit.models.blocks import find_blocks
from fedsplit.models.private import tree_flatten, tree_leaves, tree_unflatten
from fedsplit.models.spec import model_class, usable_config
from fedsplit.models.tiny import example_inputs, narrow
from fedsplit.models.weights import stir

EMBED = -1


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model, by name.

    Parameters
    ----------
    blocks : tuple of str
        Module names of the blocks, in the order they run.
    positions : mapping of str to frozenset of int
        For each weight (parameter or stored buffer), where the forward pass uses it: -1 before
        the first block, ``i`` in block ``i``, ``len(blocks)`` after the last one.
    calls : mapping of str to frozenset of int
        The same for each module that has tied weights: where it is called. The head and the
        embeddings share their weights, but not the adapters around them.
    kept : frozenset of int
        Leaves of a block's output that anything later reads.
    """

    blocks: tuple[str, ...]
    positions: Mapping[str, frozenset[int]]
    calls: Mapping[str, frozenset[int]]
    kept: frozenset[int]

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def prune(self, output: Any) -> Any:
        """Return a block's output with None for what nothing later reads."""
        leaves, spec = tree_flatten(output)
        return tree_unflatten(
            [leaf if index in self.kept else None for index, leaf in enumerate(leaves)], spec
        )

    def of_module(self, name: str) -> frozenset[int]:
        """Return the positions that call the module `name`, or use any weight of it."""
        return self.calls.get(name, self._below.get(name, frozenset()))

    @cached_property
    def _below(self) -> Mapping[str, frozenset[int]]:
        """Positions of all weights of each module."""
        found: dict[str, set[int]] = defaultdict(set)
        for key, where in self.positions.items():
            parts = key.split(".")
            for end in range(1, len(parts)):
                found[".".join(parts[:end])] |= where
        return {name: frozenset(where) for name, where in found.items()}


def anatomy(config: PretrainedConfig, task: str) -> Anatomy:
    """Return the anatomy of the model that `config` describes (cached by its narrow twin)."""
    key = (task, narrow(config).to_json_string(use_diff=False))
    if key not in _KNOWN:
        _KNOWN[key] = _examine(config, task)
    return _KNOWN[key]


def build_twin(config: PretrainedConfig, task: str, stirred: bool = True) -> PreTrainedModel:
    """Return a narrow twin of the model that `config` describes, in float32.

    `stirred` moves it a little away from its initial values, buffers included.
    """
    small = usable_config(narrow(config), task)
    cls: Any = model_class(small, task)
    twin: PreTrainedModel = cls._from_config(small, dtype=torch.float32).eval()
    if stirred:
        stir(twin, seed=0)
    return twin


_KNOWN: dict[tuple[str, str], Anatomy] = {}


def _examine(config: PretrainedConfig, task: str) -> Anatomy:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        twin = build_twin(config, task)
    blocks = find_blocks(twin)
    inputs = example_inputs(twin.config, task)
    watch = _Watch(twin, blocks)
    with torch.no_grad(), watch:
        logits = twin(**inputs).logits
    positions = watch.positions()
    everywhere = frozenset(range(EMBED, len(blocks) + 1))
    for name in _read_later(twin, blocks, inputs, positions):
        positions[name] = everywhere
    return Anatomy(blocks, positions, watch.calls(), _kept(twin, blocks, inputs, logits))


class _Watch(TorchFunctionMode):
    """Notes, during a forward pass, between which blocks each weight is used."""

    def __init__(self, model: nn.Module, blocks: Iterable[str]) -> None:
        super().__init__()
        self._names = defaultdict(list)
        for name, weight in _weights(model).items():
            self._names[id(weight)].append(name)
        self._uses: dict[int, set[int]] = defaultdict(set)
        self._here = EMBED
        self._blocks = tuple(blocks)
        self._modules = [model.get_submodule(name) for name in self._blocks]
        self._tied = {
            name.rpartition(".")[0]: model.get_submodule(name.rpartition(".")[0])
            for names in self._names.values()
            if len(names) > 1
            for name in names
        }
        self._calls: dict[str, set[int]] = defaultdict(set)
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Watch":
        for name, module in self._tied.items():
            self._hooks.append(module.register_forward_pre_hook(self._note(name)))
        for index, module in enumerate(self._modules):
            self._hooks.append(module.register_forward_pre_hook(self._move_to(index)))
            self._hooks.append(module.register_forward_hook(self._move_to(index + 1)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _move_to(self, position: int) -> Callable[..., None]:
        def move(*_: Any) -> None:
            self._here = position

        return move

    def _note(self, name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            self._calls[name].add(self._here)

        return note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Reading a weight's shape or type is no use of its values.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and id(leaf) in self._names:
                    self._uses[id(leaf)].add(self._here)
        return result

    def positions(self) -> dict[str, frozenset[int]]:
        """Return the positions of every weight; those of a block belong there at least."""
        found = {}
        for key, names in self._names.items():
            uses = set(self._uses[key])
            for name in names:
                uses |= {
                    index
                    for index, block in enumerate(self._blocks)
                    if name.startswith(f"{block}.")
                }
            found.update(dict.fromkeys(names, frozenset(uses or {EMBED})))
        return found

    def calls(self) -> dict[str, frozenset[int]]:
        """Return the positions that call each module with tied weights, if any does."""
        return {name: frozenset(where) for name, where in self._calls.items()}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict(keep_vars=True))


@torch.no_grad()
def _read_later(
    twin: PreTrainedModel,
    blocks: tuple[str, ...],
    inputs: dict[str, Tensor],
    positions: Mapping[str, frozenset[int]],
) -> list[str]:
    """Return the weights used before the first block whose values later blocks read directly.

    Some models compute there what every block is given besides the hidden states, such as a table
    of positions. Found by fixing the first block's output and blanking one weight at a time.
    """
    first = twin.get_submodule(blocks[0])
    fixed: list[Any] = []
    _forward_with(twin, [first], inputs, lambda _module, _args, output: fixed.append(output))

    def fix(_module: Any, _args: Any, _output: Any) -> Any:
        return fixed[0]

    expected = _forward_with(twin, [first], inputs, fix)
    found = []
    for name, weight in _weights(twin).items():
        if positions[name] != {EMBED}:
            continue
        value = weight.clone()
        weight.zero_()
        if not torch.equal(_forward_with(twin, [first], inputs, fix), expected):
            found.append(name)
        weight.copy_(value)
    return found


def _kept(
    twin: PreTrainedModel, blocks: tuple[str, ...], inputs: dict[str, Tensor], logits: Tensor
) -> frozenset[int]:
    """Return which leaves of the blocks' outputs change what the twin computes."""
    modules = [twin.get_submodule(name) for name in blocks]
    counts: set[int] = set()

    def count(_module: Any, _args: Any, output: Any) -> None:
        counts.update(
            index for index, leaf in enumerate(tree_leaves(output)) if isinstance(leaf, Tensor)
        )

    _forward_with(twin, modules, inputs, count)
    kept = {0}
    for index in sorted(counts - {0}):

        def spoil(_module: Any, _args: Any, output: Any, index: int = index) -> Any:
            leaves, spec = tree_flatten(output)
            leaves[index] = None
            return tree_unflatten(leaves, spec)

        try:
            same = torch.equal(_forward_with(twin, modules, inputs, spoil), logits)
        except (TypeError, AttributeError, ValueError, RuntimeError, IndexError):
            same = False
        if not same:
            kept.add(index)
    return frozenset(kept)


@torch.no_grad()
def _forward_with(
    twin: PreTrainedModel,
    modules: list[nn.Module],
    inputs: dict[str, Tensor],
    hook: Callable[..., Any],
) -> Tensor:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        logits: Tensor = twin(**inputs).logits
        return logits
    finally:
        for handle in handles:
            handle.remove()
