"""Peak memory of a server that trains many branches, measured in a process of its own.

The server holds all but the first blocks of a small ViT with random weights, with LoRA adapters for
every branch. With copies the frozen weights are held once for every branch and all mini-batches are
live at once. Else weights are shared and mini-batches come one at a time, as in
`fedsplit.execution.Stage`.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from fedsplit.arrays import Array
from fedsplit.execution.peak import forget_peak, peak_bytes
from fedsplit.models import ModelSpec, Output, load
from fedsplit.plan import Route

from ..coded import first_part
from .study import Case, Values, model

BATCH, PIXELS = 2, 224


def add(case: Case, numbers: dict[str, Values]) -> None:
    """Measure a server of SplitLLM's K branches, and of N."""
    fleet, spec = case.config.fleet, model(case.config, "measured")
    counts, ways = {"": fleet.devices, "few ": fleet.edges}, {"copies": True, "shared": False}
    numbers["server_memory_bytes"] = found = dict[str, Array]()
    spawned = multiprocessing.get_context("spawn")
    # Each in a process of its own, whose peak is of nothing else.
    with ProcessPoolExecutor(1, mp_context=spawned, max_tasks_per_child=1) as processes:
        for (few, branches), (name, copies) in product(counts.items(), ways.items()):
            found[few + name] = np.array(processes.submit(_serve, spec, branches, copies).result())


def _serve(spec: ModelSpec, branches: int, copies: bool) -> float:
    """Train a step of every branch in this process; return the rise of its peak memory."""
    torch.set_num_threads(1)
    route = Route.two_tier(spec.config["num_hidden_layers"], 2)
    first, segment = route.segments
    labels = torch.zeros(BATCH, dtype=torch.long)
    pixels = {"pixel_values": torch.zeros(BATCH, 3, PIXELS, PIXELS), "labels": labels}
    boundary = first_part(load(spec, [first]), route, pixels).detach()
    forget_peak()
    before = peak_bytes()
    shared = load(spec, [segment])
    held: list[object] = []
    live: list[Tensor] = []
    for branch in range(branches):
        own = load(spec, [segment]) if copies and branch else shared
        adapters = {name: nn.Parameter(v) for name, v in own.adapters(segment).items()}
        own.install(adapters)
        output = own.train().run(segment, {"labels": labels}, boundary.leaf())
        assert isinstance(output, Output)
        held.append((own, adapters))
        live.append(output.loss)
        if not copies:
            live.pop().backward()  # type: ignore[no-untyped-call]
    for loss in live:
        loss.backward()  # type: ignore[no-untyped-call]
    return float(peak_bytes() - before)
