"""Narrow twins cut in tiers: built once, so that a trial of a route copies and builds nothing."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fedsplit.models.adapters import adapted_module, base_path, is_adapter
from fedsplit.models.loading import assemble_model, owned_and_read, parts_of
from fedsplit.models.phantoms import phantom
from fedsplit.models.spec import ModelSpec
from fedsplit.models.split import SplitModel
from fedsplit.models.weights import stir
from fedsplit.plan import DEVICE, Route, Segment


@dataclass(frozen=True)
class Chain(Route):
    """A route to try many cuts at once: more tiers than a plan may name, one for each segment."""

    def __post_init__(self) -> None:
        """Allow any names."""

    @classmethod
    def at(cls, n_blocks: int, cuts: Sequence[int]) -> Route:
        """Return the route through `cuts`; with a single one, the two-tier route."""
        if len(cuts) == 1:
            return Route.two_tier(n_blocks, cuts[0])
        return cls.through(n_blocks, cuts, [DEVICE, *(f"tier{index}" for index in cuts)])


class Twin:
    """A narrow model with all its weights, of which tiers are copied.

    A tier has what `fedsplit.models.loading.assemble` would give it: weights of its own segments,
    phantoms elsewhere, no module in common with another tier that runs on both. All weights are
    stirred, so that no gradient is zero by construction (LoRA starts with B = 0).

    Parameters
    ----------
    spec : ModelSpec
        What is trained; its source is not read, weights are random.
    config : PretrainedConfig
        The model, narrow and without dropout.
    """

    def __init__(self, spec: ModelSpec, config: PretrainedConfig) -> None:
        self._spec, self._config = spec, config
        self._parts = parts = parts_of(spec, config)
        everywhere = frozenset(range(-1, parts.n_blocks + 1))
        self._model = assemble_model(spec, config, parts, everywhere, torch.device("cpu"))
        stir(self._model, spec.seed)
        self._weights: dict[int, tuple[Tensor, frozenset[int]]] = {}
        for name, value in self._model.state_dict(keep_vars=True).items():
            where = (
                parts.of_module(adapted_module(name))
                if is_adapter(name)
                else parts.positions[base_path(name)]
            )
            _, known = self._weights.get(id(value), (value, frozenset()))
            self._weights[id(value)] = value, known | where
        weights = self._weights.items()
        self._phantoms = {key: _like(value, held=False) for key, (value, _) in weights}
        hollow = copy.deepcopy(self._model, dict(self._phantoms))
        self._inner = [
            (index, id(child), hollow.get_submodule(f"{name}.{short}"), self._positions(child))
            for index, name in enumerate(parts.blocks)
            for short, child in self._model.get_submodule(name).named_children()
        ]

    def tier(self, segments: Sequence[Segment]) -> SplitModel:
        """Return a tier that runs `segments`, in training mode.

        Raises
        ------
        FedsplitError
            As `assemble`.
        """
        owned, read = owned_and_read(self._spec, segments, self._parts.n_blocks)
        memo: dict[int, Any] = dict(self._phantoms)
        for key, (value, where) in self._weights.items():
            if not read.isdisjoint(where):
                memo[key] = _like(value, held=True)
        # Of a block that does not run here, only what the model's own code may ask it is new.
        for index, key, hollow, where in self._inner:
            if index not in read and where and read.isdisjoint(where):
                memo[key] = hollow
        model = copy.deepcopy(self._model, memo)
        return SplitModel(self._spec, self._config, model, self._parts, owned).train()

    def _positions(self, module: nn.Module) -> frozenset[int]:
        """Return where the weights of `module` are used."""
        values = module.state_dict(keep_vars=True).values()
        return frozenset().union(*(self._weights[id(value)][1] for value in values))


def _like(value: Tensor, held: bool) -> Tensor:
    new = value.detach().clone() if held else phantom(value)
    if isinstance(value, nn.Parameter):
        return nn.Parameter(new, requires_grad=held and value.requires_grad)
    return new
