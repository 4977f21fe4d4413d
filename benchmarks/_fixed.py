"""What a split step costs beside its arithmetic: both halves in one process, no link between."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks._scale_flower import BATCH, TOKENS, model_of, train
from benchmarks.scale import write_checkpoint
from fedsplit.execution import OptimizerSpec
from fedsplit.execution.tier import Tier
from fedsplit.models import Boundary, ModelSpec, load
from fedsplit.plan import DEVICE, Segment


def fixed_ms(steps: int = 60, repeats: int = 5) -> float:
    """Return the CPU milliseconds of a split step beyond an unsplit one, of a tiny model.

    Split are a forward and a backward pass of each of two blocks, on tiers with an optimizer each;
    unsplit is a PEFT loop as a user writes it. They take turns; the median counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        plain = model_of(folder)
        model = load(ModelSpec(source=folder, target_modules="all-linear"))
    whole = [Segment(DEVICE, 0, 1), Segment("server", 1, 2)]
    start = model.adapters(Segment(DEVICE, 0, 2))
    near, far = (Tier(model, [segment], start, OptimizerSpec(lr=1e-2), 0) for segment in whole)
    home = SimpleNamespace(returns_home=False)
    tokens = torch.randint(0, 100, (BATCH, TOKENS))
    batch = {"input_ids": tokens, "labels": tokens}

    def split() -> None:
        onward = model.travelling(batch, home)  # type: ignore[arg-type]
        produced = near.forward(whole[0], batch)
        crossed = Boundary(
            tuple(item.detach().requires_grad_(item.requires_grad) for item in produced.tensors),
            produced.layout,
        )
        _, gradients = far.train_on(whole[1], onward, crossed)
        near.backward(produced, gradients)
        for tier in (near, far):
            tier.update()

    def cost_ms(step: Callable[[], object]) -> float:
        begun = time.process_time()
        for _ in range(steps):
            step()
        return (time.process_time() - begun) / steps * 1e3

    found = []
    for repeat in range(repeats + 1):
        unsplit = cost_ms(lambda: train(plain))
        beyond = cost_ms(split) - unsplit
        if repeat:  # the first warms up
            found.append(beyond)
    return statistics.median(found)
