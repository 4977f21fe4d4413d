"""Peak memory of a server that trains many branches, measured in a process of its own.

The server holds all but the first blocks of a small ViT with random weights, with LoRA adapters for
every branch. With copies the frozen weights are held once for every branch and all mini-batches are
live at once. Else weights are shared and mini-batches come one at a time, as in
`fedsplit.execution.Stage`.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from .study import Values

CONFIG = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_labels": 10,
}
CUT, BATCH, PIXELS = 2, 2, 224


def add(config: DictConfig, numbers: dict[str, Values]) -> dict[str, object]:
    """Measure a server of SplitLLM's K branches, and of N."""
    everyone, at_once = config.fleet.devices, config.fleet.edges
    numbers["server_memory_bytes"] = {
        "copies": measured_bytes(everyone, copies=True),
        "few copies": measured_bytes(at_once, copies=True),
        "shared": measured_bytes(everyone, copies=False),
        "few shared": measured_bytes(at_once, copies=False),
    }
    return {}


def measured_bytes(branches: int, copies: bool) -> np.ndarray:
    """Return how much the peak of a process of its own rises while it serves `branches`."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return np.array(process.submit(serve, branches, copies).result())


def serve(branches: int, copies: bool) -> float:
    """Train a step of every branch in this process; return the rise of its peak memory."""
    import torch
    from torch import nn

    from fedsplit.models import Boundary, ModelSpec, Output, SplitModel, load
    from fedsplit.plan import Route

    torch.set_num_threads(1)
    spec = ModelSpec(
        model_type="vit",
        task="image-classification",
        target_modules="all-linear",
        r=16,
        config=CONFIG,
    )
    route = Route.two_tier(CONFIG["num_hidden_layers"], CUT)
    first, segment = route.segments
    pixels = torch.zeros(BATCH, 3, PIXELS, PIXELS)
    inputs = {"pixel_values": pixels, "labels": torch.zeros(BATCH, dtype=torch.long)}
    arrived = load(spec, [first]).run(first, inputs)
    assert isinstance(arrived, Boundary)
    boundary, later = arrived.detach(), {"labels": inputs["labels"]}

    def models() -> Iterator[SplitModel]:
        shared = load(spec, [segment])
        for branch in range(branches):
            yield load(spec, [segment]) if copies and branch else shared

    def forward(model: SplitModel) -> tuple[torch.Tensor, dict[str, nn.Parameter]]:
        adapters = {name: nn.Parameter(v) for name, v in model.adapters(segment).items()}
        model.install(adapters)
        output = model.train().run(segment, later, boundary.leaf())
        assert isinstance(output, Output)
        return output.loss, adapters

    before = resident_bytes("VmRSS")
    held, live = [], []
    for model in models():
        loss, adapters = forward(model)
        held.append((model, adapters))
        if copies:
            live.append(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
    for loss in live:
        loss.backward()  # type: ignore[no-untyped-call]
    return resident_bytes("VmHWM") - before


def resident_bytes(line: str) -> float:
    """Return this process's resident memory: now ("VmRSS") or at its peak ("VmHWM")."""
    status = Path("/proc/self/status").read_text().splitlines()
    found = next(text for text in status if text.startswith(line))
    return int(found.split()[1]) * 1024.0
