"""How a turn trains: an optimizer and the recipe around it, plain settings for every tier."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Adafactor, get_scheduler

from fedsplit.errors import SettingsError, require, require_choice, require_known
from fedsplit.mapping import parameters_of

SCHEDULES = ("constant", "linear", "cosine")
OVER = ("run", "turn")
# These do not update a parameter from its own dense gradient alone.
_LEFT_OUT = ("LBFGS", "SparseAdam", "Optimizer")
# These do the same arithmetic for all parameters at once, bit for bit, in half the time where they
# are small; it takes their memory once more.
_SAME_AT_ONCE, _FEW = ("adam", "adamw"), 1 << 22
_WAYS = frozenset({"foreach", "fused", "differentiable"})
OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    **{
        name.lower(): kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and name not in _LEFT_OUT
    },
    "transformers.adafactor": Adafactor,
}
"""Optimizers by name: torch's classes in small letters, and transformers' own."""


@dataclass(frozen=True)
class OptimizerSpec:
    """How the parameters of a turn are trained, the same on every tier.

    Each optimizer updates a parameter from that parameter's own gradients only, so training the
    segments apart equals training the whole model; what concerns all parameters together (`clip`)
    crosses the links.

    Parameters
    ----------
    name : str
        One of `OPTIMIZERS`: "adamw", "sgd", "rmsprop", ..., "transformers.adafactor".
    lr : float
        Learning rate, before `schedule`.
    weight_decay : float
        Decoupled from the gradient or added to it, as the class has it.
    momentum, betas, eps : float, tuple of float, float or None
        None for the class's own.
    options : mapping of str to object
        Its other keyword arguments.
    proximal_mu : float
        Weight of FedProx's term ``mu / 2 |w - w0|^2``, where w0 is what the turn starts from; its
        gradient is each parameter's own. A Flower strategy that asks for it sets it for a round.
    schedule : str
        "constant", "linear" or "cosine", as transformers' `get_scheduler` has them.
    schedule_over : str
        What the schedule lasts: the "run" or each "turn".
    warmup : float
        Updates in which the rate grows from 0, or, below 1, the part of the schedule's.
    clip : float or None
        The gradients' longest norm, over all tiers together; None for any.
    accumulate : int
        Mini-batches of an update, each weighted by its targets.
    overlap : int
        How many of them are under way at once, where nothing returns to the device before its
        backward pass; no bit depends on it.
    label_smoothing : float
        Part of the loss that is spread over all labels, in training.
    checkpointing : bool
        Whether blocks are computed again in the backward pass, in place of keeping what they need.
    keep_state : bool
        Whether a device's turn goes on with the moments that its last one ended with, where the
        parameter is still on the same side of the link.
    keep_order : bool
        Whether a device's turn goes on in the epoch where as many steps in every round before would
        have brought it, in place of beginning an epoch. No sample comes again before all others.
    part : tuple of int
        Which part of the schedule a turn is, and of how many: see `within`.

    Raises
    ------
    SettingsError
        If a value is outside its range.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    proximal_mu: float = 0.0
    options: Mapping[str, object] = field(default_factory=dict)
    schedule: str = "constant"
    schedule_over: str = "run"
    warmup: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    overlap: int = 1
    label_smoothing: float = 0.0
    checkpointing: bool = False
    keep_state: bool = False
    keep_order: bool = False
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        require_choice("optimizer.name", self.name.lower(), sorted(OPTIMIZERS))
        infinity = math.inf
        require(0 < self.lr < infinity, "optimizer.lr", self.lr, "positive and finite")
        for name in ("weight_decay", "momentum", "eps", "proximal_mu"):
            value = getattr(self, name)
            fits = value is None or 0 <= value < infinity
            require(fits, f"optimizer.{name}", value, "at least 0 and finite")
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(self.betas))
            in_range = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
            require(in_range, "optimizer.betas", self.betas, "two numbers in [0, 1)")
        require_choice("train.schedule", self.schedule, SCHEDULES)
        require_choice("train.schedule_over", self.schedule_over, OVER)
        whole = 0 <= self.warmup < 1 or (self.warmup < infinity and self.warmup % 1 == 0)
        allowed = "a part below 1, or a whole number of updates"
        require(whole and self.warmup >= 0, "train.warmup", self.warmup, allowed)
        clip = self.clip
        require(clip is None or 0 < clip < infinity, "train.clip", clip, "null, or above 0")
        require(self.accumulate >= 1, "train.accumulate", self.accumulate, "at least 1")
        most = f"1 to {self.accumulate}, the mini-batches of an update (train.accumulate)"
        require(1 <= self.overlap <= self.accumulate, "train.overlap", self.overlap, most)
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "train.label_smoothing", smoothing, "at least 0 and below 1")
        object.__setattr__(self, "part", tuple(self.part))
        self.build([nn.Parameter(torch.zeros(2, 2))])

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return a fresh optimizer over `parameters`.

        Raises
        ------
        SettingsError
            If its class does not take the settings, or these parameters.
        """
        kind = OPTIMIZERS[self.name.lower()]
        takes = [name for name in parameters_of(kind) if name != "params"]
        given: dict[str, Any] = {"lr": self.lr}
        for name, default in (
            ("weight_decay", 0.0), ("momentum", None), ("betas", None), ("eps", None)
        ):  # fmt: skip
            value = getattr(self, name)
            fits = value == default or name in takes
            require(fits, f"optimizer.{name}", value, f"{default}: {self.name} has none")
            if name in takes and value is not None:
                given[name] = value
        parameters = list(parameters)
        if self.name.lower() in _SAME_AT_ONCE and not self.options.keys() & _WAYS:
            given["foreach"] = sum(item.numel() for item in parameters) <= _FEW or None
        for name, value in self.options.items():
            require_known(f"optimizer.options.{name}", value, [x for x in takes if x not in given])
        try:
            return kind(parameters, **given, **self.options)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError) as error:
            message = f"settings that {kind.__name__} takes ({' '.join(str(error).split()):.150})"
            raise SettingsError("optimizer.options", dict(self.options), message) from None

    def within(self, index: int, count: int) -> "OptimizerSpec":
        """Return the settings of the `index`-th of `count` equal parts of what these are for.

        A run is the parts of its rounds, a round of its branch's waves, a turn of its updates: so
        the rate depends on the plan alone.
        """
        if self.schedule_over == "turn" or count == 1:
            return self
        return replace(self, part=_part(self.part, index, count))

    def rate(self, update: int, updates: int) -> float:
        """Return the learning rate of the `update`-th of a turn's `updates`."""
        index, total = _part(self.part, update, updates)
        warmup = int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * total)
        return self.lr * _factor(self.schedule, warmup, total)(index)

    @property
    def scheduled(self) -> bool:
        """Whether the learning rate changes."""
        return self.schedule != "constant" or self.warmup > 0

    def updates(self, steps: int) -> int:
        """Return how often the parameters change in `steps` mini-batches."""
        return math.ceil(steps / self.accumulate)


State = dict[str, Any]
"""What an optimizer keeps of one parameter: tensors and numbers by name."""


def state_of(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, State]:
    """Return copies of what `optimizer` keeps of each parameter, whose `names` are in its order.

    Tensors are on the host, wherever the parameters are.
    """
    return {
        names[index]: {key: _on_host(value) for key, value in state.items()}
        for index, state in optimizer.state_dict()["state"].items()
    }


def put_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str], kept: Mapping[str, State]
) -> None:
    """Have `optimizer` go on with what was kept of its parameters; of the others nothing was."""
    states = {index: deepcopy(kept[name]) for index, name in enumerate(names) if name in kept}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _on_host(value: object) -> object:
    return value.to("cpu", copy=True) if isinstance(value, Tensor) else deepcopy(value)


def _part(part: tuple[int, int], index: int, count: int) -> tuple[int, int]:
    return part[0] * count + index, part[1] * count


@cache
def _factor(schedule: str, warmup: int, total: int) -> Callable[[int], float]:
    """Return by how much transformers' scheduler multiplies the rate at each update."""
    nowhere = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    if schedule == "constant" and warmup:
        schedule = "constant_with_warmup"
    factor: Callable[[int], float] = get_scheduler(
        schedule, nowhere, num_warmup_steps=warmup, num_training_steps=total
    ).lr_lambdas[0]
    return factor
