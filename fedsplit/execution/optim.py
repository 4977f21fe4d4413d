"""Which optimizer trains the adapters: plain settings that travel to every tier."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fedsplit.errors import require, require_choice

NAMES = ("adamw", "adam", "sgd")


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer, made fresh on every tier at the start of every turn.

    Each of these updates a parameter from that parameter's own gradients only, so training the
    segments apart equals training the whole model.

    Parameters
    ----------
    name : str
        "adamw", "adam" or "sgd".
    lr : float
        Learning rate.
    weight_decay : float
        Decoupled from the gradient for "adamw", added to it for the others.
    momentum : float
        Of "sgd"; the others ignore it.
    betas : tuple of float
        Decay of the two moments; "sgd" ignores it.
    eps : float
        Added to the denominator; "sgd" ignores it.
    proximal_mu : float
        Weight of FedProx's term ``mu / 2 |w - w0|^2``, where w0 is what the turn starts from; its
        gradient is each parameter's own. A Flower strategy that asks for it sets it for a round.

    Raises
    ------
    FedsplitError
        If a value is outside its range.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    proximal_mu: float = 0.0

    def __post_init__(self) -> None:
        require_choice("optimizer.name", self.name, NAMES)
        infinity = float("inf")
        require(0 < self.lr < infinity, "optimizer.lr", self.lr, "positive and finite")
        for field in ("weight_decay", "momentum", "eps", "proximal_mu"):
            value = getattr(self, field)
            require(0 <= value < infinity, f"optimizer.{field}", value, "at least 0 and finite")
        object.__setattr__(self, "betas", tuple(self.betas))
        in_range = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(in_range, "optimizer.betas", self.betas, "two numbers in [0, 1)")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return a fresh optimizer over `parameters`."""
        chosen = list(parameters)
        if self.name == "sgd":
            return torch.optim.SGD(
                chosen, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
            )
        kind = torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam
        return kind(
            chosen, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
