"""Attacks on what a device hands back: tokens of a turn from the change of its adapters.

In the first block a token's vector does not depend on the tokens around it. The gradient of LoRA's
A there is a sum of such vectors, whatever the number of steps, so that a change made by plain
gradient descent lies in their span: DAGER (Petrov et al., "DAGER: Exact gradient inversion for
large language models", NeurIPS 2024), whose test of single tokens is exact if there are no more
distinct ones than rows. With more of them, or another optimizer, nothing is exact. Then it is
learnt, from turns of texts of the server's own, how much more the change goes in a token's
direction if it was there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import normalize

from fedsplit.models import SplitModel
from fedsplit.plan import DEVICE, Segment

_REPEATED = 4
_CHUNK = 2048
_NEWTON = 15
_TINY = 1e-12
_FLAT = 1e-5  # of the largest singular value: what is below it is rounding


@dataclass(frozen=True)
class FirstInputs:
    """What the first adapters of a model read.

    Parameters
    ----------
    names : tuple of str
        The A of each layer that reads the same vectors first.
    vectors : Tensor
        What it reads of each token, scaled to length 1, ``[vocabulary, width]``; if it depends on
        the position, the mean over the first few.
    """

    names: tuple[str, ...]
    vectors: Tensor

    @classmethod
    def of(cls, model: SplitModel) -> "FirstInputs | None":
        """Return those of the first block of `model`; None if it has no LoRA there.

        `model` holds that block and the embeddings.
        """
        first = Segment(DEVICE, 0, 1)
        held = [name for name in model.adapter_names(first) if name.endswith(".lora_A.weight")]
        layers = {
            name: module
            for name, module in model.model.named_modules()
            if isinstance(module, LoraLayer) and isinstance(module, nn.Module)
        }
        of_layer = {f"base_model.model.{name}.lora_A.weight": name for name in layers}
        heard: dict[str, Tensor] = {}

        def hear(name: str) -> Any:
            return lambda _, arguments: heard.__setitem__(name, arguments[0])

        hooks = [
            layers[of_layer[name]].register_forward_pre_hook(hear(name))
            for name in held
            if name in of_layer
        ]
        size = int(model.config.get_text_config().vocab_size)
        tokens = torch.arange(size, device=model.model.device)[:, None].expand(size, _REPEATED)
        vectors = []
        try:
            with torch.no_grad():
                for ids in torch.split(tokens, _CHUNK):
                    heard.clear()
                    model.run(first, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
                    if not heard:
                        return None
                    read = next(iter(heard.values()))
                    names = tuple(name for name, value in heard.items() if value is read)
                    vectors.append(normalize(read.float().mean(1)))
        finally:
            for hook in hooks:
                hook.remove()
        return cls(names, torch.cat(vectors))

    def change(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
        """Return how a turn changed the layers: rows ``[layers, rank, width]``."""
        return torch.stack([(after[name] - before[name]).float() for name in self.names])

    def within(self, change: Tensor) -> Tensor:
        """Return the part of each token's vector in the span of a change's rows, 0 to 1."""
        _, values, rows = torch.linalg.svd(change.flatten(0, 1), full_matrices=False)
        basis = rows[values > _FLAT * values[0]]
        inside: Tensor = (self.vectors @ basis.T).square().sum(1)
        return inside


def tokens_in_span(inputs: FirstInputs, change: Tensor, nearly: float = 0.99) -> Tensor:
    """Return the tokens whose vectors lie in the span of a change, in order.

    They are those of the turn, if it was of plain gradient descent and had no more distinct ones
    than `change` has rows.
    """
    return (inputs.within(change) > nearly).nonzero().flatten()


class UpdateReader:
    """Ranks tokens by how likely they were in a turn, learnt from turns of the server's own texts.

    Parameters
    ----------
    inputs : FirstInputs
        Of the model that all turns began with.
    turns : sequence of (Tensor, Tensor)
        The change that each made, and its tokens.
    counts : Tensor
        How often each token stands in the server's texts, ``[vocabulary]``.
    """

    def __init__(
        self, inputs: FirstInputs, turns: Sequence[tuple[Tensor, Tensor]], counts: Tensor
    ) -> None:
        self._inputs = inputs
        self._usual = counts.double().add(0.5).log()
        told = torch.stack([self._evidence(change) for change, _ in turns])
        self._mean = told.mean(0)
        present = torch.zeros(told.shape[:2], dtype=torch.double)
        for row, (_, tokens) in zip(present, turns, strict=True):
            row[tokens] = 1.0
        rows = torch.cat([self._rows(each) for each in told])
        self._weights = _logistic(rows, present.flatten())

    def read(self, change: Tensor, count: int) -> Tensor:
        """Return the `count` likeliest tokens of a turn."""
        scores = self._rows(self._evidence(change)) @ self._weights
        return scores.topk(count).indices

    def guess(self, count: int) -> Tensor:
        """Return the `count` tokens that are usual: the likeliest without any change."""
        return self._usual.topk(count).indices

    def _evidence(self, change: Tensor) -> Tensor:
        """Return how far a change goes in each token's direction, ``[vocabulary, layers + 1]``."""
        unit = change / change.norm(dim=(1, 2), keepdim=True).clamp_min(_TINY)
        vectors = self._inputs.vectors
        along = [(vectors @ rows.T).square().sum(1) for rows in unit]
        joined = torch.stack([*along, self._inputs.within(change)], 1)
        return joined.double().clamp_min(_TINY).log()

    def _rows(self, evidence: Tensor) -> Tensor:
        more = evidence - self._mean
        usual = self._usual[:, None]
        return torch.cat([more, usual, usual.square(), torch.ones_like(usual)], 1)


def _logistic(rows: Tensor, present: Tensor) -> Tensor:
    """Return the weights of a logistic regression, a little drawn to zero, by Newton's method."""
    weights = rows.new_zeros(rows.shape[1])
    unit = torch.eye(rows.shape[1], dtype=rows.dtype)
    for _ in range(_NEWTON):
        chance = torch.sigmoid(rows @ weights)
        slope = rows.T @ (chance - present) + weights
        bend = (rows * (chance * (1 - chance))[:, None]).T @ rows + unit
        weights = weights - torch.linalg.solve(bend, slope)
    return weights
