"""Where in a model the trained tensors of a tier hang."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from fedsplit.errors import FedsplitError
from fedsplit.models.adapters import adapted_module, is_adapter, peft_key
from fedsplit.models.anatomy import Anatomy
from fedsplit.models.private import BatchNorm
from fedsplit.models.ranks import require_fit


@dataclass(frozen=True)
class Slot:
    """Where a trained tensor hangs in the model: at several places if they are tied.

    `like` has the shape and type that it is made with, and no memory.
    """

    position: int
    places: tuple[tuple[nn.Module, str], ...]
    like: Tensor

    def get(self) -> Tensor:
        """Return the tensor."""
        module, name = self.places[0]
        value: Tensor = getattr(module, name)
        return value

    def fresh(self, name: str, value: Tensor | None) -> nn.Parameter:
        """Return a parameter of its own with `value`, by default the one that hangs there.

        Raises
        ------
        FedsplitError
            If it has another shape, but for fewer components; names it as `name`.
        """
        held = self.get()
        value = held if value is None else value
        require_fit(name, value, self.like)
        copy = value.detach().to(held.device, self.like.dtype, copy=True)
        return nn.Parameter(copy, requires_grad=held.requires_grad)

    def put(self, value: nn.Parameter) -> None:
        """Hang `value` there, the object itself."""
        for module, name in self.places:
            table = module._parameters if name in module._parameters else module._buffers
            table[name] = value


def find_slots(
    model: PreTrainedModel,
    parts: Anatomy,
    owned: frozenset[int],
    norms: Iterable[BatchNorm],
    train: str,
) -> dict[str, Slot]:
    """Return every trained tensor that a tier holds, by name.

    Parameters
    ----------
    model : PreTrainedModel
        With its adapters.
    parts : Anatomy
        Of the model.
    owned : frozenset of int
        Positions that the tier holds.
    norms : iterable of batch norms
        Their running statistics are trained too, with ``train: full``.
    train : str
        "lora" or "full".

    Raises
    ------
    FedsplitError
        If a tensor is used at several places of which the tier holds some only.
    """
    lora = train == "lora"
    statistics = {
        id(value)
        for norm in norms
        for value in (norm.running_mean, norm.running_var)
        if value is not None
    }
    tied: dict[int, list[str]] = defaultdict(list)
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if is_adapter(name) if lora else value.requires_grad or id(value) in statistics:
            tied[id(value)].append(name)
    slots = {}
    for names in tied.values():
        name = names[0]
        where = parts.of_module(adapted_module(name)) if lora else parts.positions[name]
        if where.isdisjoint(owned):
            continue
        if not where <= owned:
            raise FedsplitError(
                f"train={train!r}: {name!r} is used at several places of "
                f"{model.config.model_type!r} that the route puts on different tiers (tied "
                "embeddings, or a layer shared by blocks); keep them on one tier (with tied "
                "embeddings: a U-shaped route, or train=lora)"
            )
        slots[peft_key(name) if lora else name] = Slot(
            min(where),
            tuple(_place(model, alias) for alias in names),
            state[name].detach().to("meta"),
        )
    return slots


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, short = name.rpartition(".")
    return model.get_submodule(owner), short
