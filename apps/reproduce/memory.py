"""Peak memory of a server that trains many branches, measured in a process of its own.

The server holds all but the first blocks of a small ViT with random weights, with LoRA adapters for
every branch. With copies the frozen weights are held once for every branch and all mini-batches are
live at once. Else weights are shared and mini-batches come one at a time, as in
`fedsplit.execution.Stage`.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from fedsplit.arrays import Array
from fedsplit.models import Boundary, ModelSpec, Output, load
from fedsplit.plan import Route

from .study import Values

SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_labels": 10,
}
MODEL = ModelSpec(
    model_type="vit",
    task="image-classification",
    target_modules="all-linear",
    r=16,
    config=SHAPE,
)
BATCH, PIXELS = 2, 224


def add(config: DictConfig, numbers: dict[str, Values]) -> dict[str, object]:
    """Measure a server of SplitLLM's K branches, and of N."""
    counts = {"": config.fleet.devices, "few ": config.fleet.edges}
    ways = {"copies": True, "shared": False}
    numbers["server_memory_bytes"] = {
        f"{few}{name}": measured_bytes(branches, copies)
        for few, branches in counts.items()
        for name, copies in ways.items()
    }
    return {}


def measured_bytes(branches: int, copies: bool) -> Array:
    """Return how much the peak of a process of its own rises while it serves `branches`."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return np.array(process.submit(_serve, branches, copies).result())


def _serve(branches: int, copies: bool) -> float:
    """Train a step of every branch in this process; return the rise of its peak memory."""
    torch.set_num_threads(1)
    first, segment = Route.two_tier(SHAPE["num_hidden_layers"], 2).segments
    labels = torch.zeros(BATCH, dtype=torch.long)
    pixels = {"pixel_values": torch.zeros(BATCH, 3, PIXELS, PIXELS), "labels": labels}
    arrived = load(MODEL, [first]).run(first, pixels)
    assert isinstance(arrived, Boundary)
    boundary = arrived.detach()
    before = _resident_bytes("VmRSS")
    shared = load(MODEL, [segment])
    held: list[object] = []
    live: list[Tensor] = []
    for branch in range(branches):
        model = load(MODEL, [segment]) if copies and branch else shared
        adapters = {name: nn.Parameter(v) for name, v in model.adapters(segment).items()}
        model.install(adapters)
        output = model.train().run(segment, {"labels": labels}, boundary.leaf())
        assert isinstance(output, Output)
        held.append((model, adapters))
        live.append(output.loss)
        if not copies:
            live.pop().backward()  # type: ignore[no-untyped-call]
    for loss in live:
        loss.backward()  # type: ignore[no-untyped-call]
    return _resident_bytes("VmHWM") - before


def _resident_bytes(line: str) -> float:
    """Return this process's resident memory: now ("VmRSS") or at its peak ("VmHWM")."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(text for text in status if text.startswith(line)).split()[1]) * 1024.0
