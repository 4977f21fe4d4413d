"""Where residuals hang in a model: what earlier rounds left beside the adapters, trained nowhere.

See `fedsplit.models.ranks` for what they are. PEFT adds up all adapters of a layer: a residual is a
second one, at the scale of the first and without dropout.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import cast

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedsplit.models.adapters import PEFT_PREFIX
from fedsplit.models.lora import ADAPTER
from fedsplit.models.ranks import (
    factor_of,
    pair_of,
    rank_axis,
    require_fit,
    residual_of,
    with_residuals,
)
from fedsplit.models.slots import Slot

RESIDUAL = "residual"
"""PEFT's name of the second adapter."""


class Residuals:
    """The residuals of a model that many branches share: each installs its own, or none.

    Parameters
    ----------
    model : PreTrainedModel
        With its adapters.
    slots : mapping of str to Slot
        Where these hang.
    """

    def __init__(self, model: PreTrainedModel, slots: Mapping[str, Slot]) -> None:
        self._model = model
        self._slots = slots
        self._places: dict[str, tuple[nn.Module, str]] = {}  # of those that ever came

    def forms(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors like the largest residuals beside the factors among `names`."""
        found = {}
        for name in names:
            other = pair_of(name)
            if other is not None:
                a, b = self._slots[name].like, self._slots[other].like
                most = min(a[0].numel(), b.shape[0])  # more say no more
                found[str(residual_of(name))] = a.new_empty((most, *a.shape[1:]))
                found[str(residual_of(other))] = b.new_empty((b.shape[0], most, *b.shape[2:]))
        return found

    def fixed(
        self, names: Sequence[str], adapters: Mapping[str, Tensor]
    ) -> dict[str, nn.Parameter]:
        """Return those of `adapters` that stand beside `names`, as parameters nobody trains.

        Raises
        ------
        FedsplitError
            If one has another shape than its module, but for its rank.
        """
        beside = with_residuals(names, adapters)[len(names) :]
        forms, found = self.forms(names) if beside else {}, {}
        for name in beside:
            require_fit(name, adapters[name], forms[name])
            value = adapters[name].detach().to(self._model.device, forms[name].dtype)
            found[name] = nn.Parameter(value, requires_grad=False)
        return found

    def install(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the residuals among `parameters` in place, and those of others that are not away."""
        for name in parameters:
            factor = factor_of(name)
            if factor is not None and name not in self._places:
                self._places[name] = self._place(factor)
        for name, (module, where) in self._places.items():
            table = module._parameters
            table[where] = parameters.get(name, _none(factor_of(name) or "", table[where]))

    def _place(self, factor: str) -> tuple[nn.Module, str]:
        path, _, which = factor.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        layer = cast("LoraLayer", self._model.get_submodule(path))
        table = getattr(layer, f"lora_{which.removesuffix('.weight')}")
        if RESIDUAL not in table:
            _add(layer)
        return (table[RESIDUAL], "weight") if which.endswith(".weight") else (table, RESIDUAL)


def _add(layer: LoraLayer) -> None:
    """Give `layer` a second adapter, of rank 0."""
    for settings in (layer.r, layer.lora_alpha, layer.scaling, layer.use_rslora, layer.use_dora):
        settings[RESIDUAL] = settings[ADAPTER]
    layer.lora_bias[RESIDUAL] = False
    layer.lora_dropout[RESIDUAL] = nn.Identity()
    for modules, name in (
        (layer.lora_A, "x.lora_A.weight"),
        (layer.lora_B, "x.lora_B.weight"),
    ):
        if ADAPTER in modules:
            modules[RESIDUAL] = deepcopy(modules[ADAPTER])
            modules[RESIDUAL]._parameters["bias"] = None
            table = modules[RESIDUAL]._parameters
            table["weight"] = _none(name, table["weight"])
    for factors, name in (
        (layer.lora_embedding_A, "x.lora_embedding_A"),
        (layer.lora_embedding_B, "x.lora_embedding_B"),
    ):
        if ADAPTER in factors:
            factors[RESIDUAL] = _none(name, factors[ADAPTER])
    layer._active_adapter = [ADAPTER, RESIDUAL]


def _none(factor: str, like: Tensor | None) -> nn.Parameter:
    """Return a factor like `like`, of no component."""
    axis = rank_axis(factor)
    assert axis is not None
    assert like is not None
    return nn.Parameter(like.detach().narrow(axis, 0, 0).clone(), requires_grad=False)
