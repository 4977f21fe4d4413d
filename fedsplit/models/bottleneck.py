"""A bottleneck: few numbers for each token between two blocks, projected on both sides.

The narrow tensor is what the one block returns and the next one takes, so that a cut there sends
nothing else. The projection down belongs to the block before it, that up to the block behind it;
both are trained, and averaged like adapters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from fedsplit.errors import require
from fedsplit.models.phantoms import phantom
from fedsplit.models.private import tree_flatten, tree_unflatten
from fedsplit.seeds import derive_seed

DOWN, UP = "bottleneck_down", "bottleneck_up"


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """Where a model is narrow.

    Parameters
    ----------
    after : int
        Blocks before it, at least one. No route may leave the device before it.
    width : int
        Numbers for each token.

    Raises
    ------
    SettingsError
        If a value is out of range.
    """

    after: int
    width: int

    def __post_init__(self) -> None:
        for name in ("after", "width"):
            value = getattr(self, name)
            require(value >= 1, f"privacy.bottleneck.{name}", value, "at least 1")

    def positions(self, blocks: Sequence[str]) -> dict[str, frozenset[int]]:
        """Return the names of its weights in a model of these blocks, and the block of each."""
        return {
            f"{blocks[index]}.{name}.{part}": frozenset({index})
            for index, name in ((self.after - 1, DOWN), (self.after, UP))
            for part in ("weight", "bias")
        }


class _Projection(nn.Module):
    """A linear map that no search for linear layers finds: it gets no adapter of its own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(weight.new_zeros(len(weight)))

    def forward(self, tensor: Tensor) -> Tensor:
        return linear(tensor.to(self.weight.dtype), self.weight, self.bias).to(tensor.dtype)


def add_bottleneck(
    model: PreTrainedModel,
    bottleneck: Bottleneck,
    blocks: Sequence[str],
    owns: Callable[[str], bool],
    seed: int,
) -> None:
    """Put a bottleneck between two of the `blocks`; only weights that are owned take memory.

    It starts as the projection on a random subspace.

    Raises
    ------
    SettingsError
        If the model has no such place, or is not as wide.
    """
    after, width = bottleneck.after, bottleneck.width
    field = "privacy.bottleneck"
    require(after < len(blocks), f"{field}.after", after, f"at most {len(blocks) - 1}")
    hidden = getattr(model.config.get_text_config(), "hidden_size", None)
    known = isinstance(hidden, int)
    require(known, field, str(bottleneck), f"null: a {model.config.model_type} has no one width")
    require(width <= int(hidden or 0), f"{field}.width", width, f"at most {hidden}")
    draw = torch.Generator().manual_seed(derive_seed(seed, "bottleneck"))
    drawn = torch.randn(int(hidden or 0), width, generator=draw, dtype=torch.float64)
    basis = torch.linalg.qr(drawn).Q.float()
    places: Any = ((after - 1, DOWN, basis.T, _narrowing), (after, UP, basis, _widening))
    for index, name, weight, kind in places:
        block: Any = model.get_submodule(blocks[index])
        own = owns(f"{blocks[index]}.{name}.weight")
        block.add_module(name, _Projection(weight.contiguous() if own else phantom(weight)))
        block.__class__ = kind(type(block))


def principal(seen: Tensor, width: int) -> dict[str, Tensor]:
    """Return a bottleneck that keeps the most of the variance of `seen`, ``[positions, hidden]``.

    With the full width it changes nothing. By the ends of its weights' names.
    """
    mean = seen.double().mean(0)
    centred = seen.double() - mean
    basis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -width:]
    found = {
        f"{DOWN}.weight": basis.T,
        f"{DOWN}.bias": -basis.T @ mean,
        f"{UP}.weight": basis,
        f"{UP}.bias": mean,
    }
    return {name: value.float().contiguous() for name, value in found.items()}


# Subclasses, not hooks or other methods: a copy of a block must compute with its own weights.
@cache
def _narrowing(kind: type[nn.Module]) -> type[nn.Module]:
    class Narrowing(kind):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            leaves, tree = tree_flatten(super().forward(*args, **kwargs))
            leaves[0] = self.bottleneck_down(leaves[0])
            return tree_unflatten(leaves, tree)

    return Narrowing


@cache
def _widening(kind: type[nn.Module]) -> type[nn.Module]:
    class Widening(kind):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if args:
                args = (self.bottleneck_up(args[0]), *args[1:])
            else:
                kwargs["hidden_states"] = self.bottleneck_up(kwargs["hidden_states"])
            return super().forward(*args, **kwargs)

    return Widening
