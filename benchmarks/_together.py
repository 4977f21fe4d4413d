"""Branches in one forward pass: a prototype of LoRA over stacked adapters.

Rows of all branches go through one frozen base; what each branch's adapters add comes from a
grouped product, `torch.bmm` over their stacked A and B. Gradients reach each branch's own
parameters, because they are those of its rows alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedsplit.models import Boundary, Output, SplitModel
from fedsplit.plan import Segment


def train_together(
    model: SplitModel,
    segment: Segment,
    branches: Sequence[Mapping[str, nn.Parameter]],
    inputs: Sequence[Mapping[str, Tensor]],
    boundaries: Sequence[Boundary],
) -> list[float]:
    """Run a route's last `segment` forward and backward for branches whose rows are alike.

    Returns each one's loss; gradients collect in its parameters and its boundary's tensors. Every
    branch must have as many samples, tokens and targets as the others, and no dropout.
    """
    count = len(branches)
    joined = {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}
    tensors = zip(*(each.tensors for each in boundaries), strict=True)
    boundary = Boundary(tuple(torch.cat(each) for each in tensors), boundaries[0].layout)
    with _grouped(model, branches):
        output = model.run(segment, joined, boundary)
    assert isinstance(output, Output)
    assert output.logits is not None
    shape = output.logits.shape
    scores = output.logits[:, :-1].reshape(count, -1, shape[-1]).float()
    wanted = joined["labels"][:, 1:].reshape(count, -1).long()
    losses = torch.stack(
        [nn.functional.cross_entropy(a, b) for a, b in zip(scores, wanted, strict=True)]
    )
    losses.sum().backward()  # type: ignore[no-untyped-call]
    return losses.tolist()


@contextmanager
def _grouped(model: SplitModel, branches: Sequence[Mapping[str, nn.Parameter]]) -> Iterator[None]:
    """Have every adapted module add what its rows' branch adds, for the block."""
    replaced: list[Any] = []
    try:
        for name, layer in model.model.named_modules():
            if isinstance(layer, LoraLayer):
                keys = [key for key in branches[0] if f"{name}.lora_" in f"{key}"]
                if keys:
                    layer.forward = _forward(layer, branches, keys)  # type: ignore[method-assign]
                    replaced.append(layer)
        if not replaced:
            raise ValueError("no adapted module has the branches' adapters")
        yield
    finally:
        for layer in replaced:
            del layer.forward


def _forward(
    layer: Any, branches: Sequence[Mapping[str, nn.Parameter]], keys: Sequence[str]
) -> Any:
    (near,) = (key for key in keys if "lora_A" in key)
    (far,) = (key for key in keys if "lora_B" in key)
    down = torch.stack([each[near] for each in branches]).transpose(1, 2)
    up = torch.stack([each[far] for each in branches]).transpose(1, 2)
    scale = layer.scaling["default"]

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        found: Tensor = layer.base_layer(x)
        rows = x.reshape(len(branches), -1, x.shape[-1])
        added = torch.bmm(torch.bmm(rows, down), up) * scale
        return found + added.reshape(found.shape)

    return forward
