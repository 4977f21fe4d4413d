"""What a model costs on this machine, block by block, by the clock."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW

from fedsplit.errors import require
from fedsplit.measured import MeasuredProfile
from fedsplit.models.blocks import find_blocks
from fedsplit.models.loading import load
from fedsplit.models.private import tree_leaves
from fedsplit.models.profile import example_batch, profile_model
from fedsplit.models.spec import ModelSpec

_COUNTERS = Path("/sys/class/powercap")


def measure_machine(
    spec: ModelSpec,
    seq_len: int,
    batch: int = 1,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> MeasuredProfile:
    """Time a training step of the model of `spec` on this machine, for a file of its own.

    Forward, backward, and the update by AdamW, which is shared out to the units by what they
    train.

    Parameters
    ----------
    spec : ModelSpec
    seq_len, batch : int
        Shape of the batch.
    repeats : int
        Steps; the median of each unit's times counts. One more goes before, unmeasured.
    clock : callable
        Tells seconds, say those of the processor on a machine that others use as well.

    Raises
    ------
    FedsplitError
        If the model is unknown or has no blocks, or `repeats` is below 1.
    """
    require(repeats >= 1, "repeats", repeats, "at least 1")
    counted = profile_model(spec, seq_len, batch)
    held = load(spec)
    held.train()
    inputs = example_batch(held.config, spec.task, seq_len, batch)
    blocks = find_blocks(held.model)
    trained = [item for item in held.model.parameters() if item.requires_grad]
    optimizer = AdamW(trained)
    runs, updates = [], []
    joules, since = _joules(), time.perf_counter()
    for _ in range(repeats + 1):
        runs.append(unit_seconds(held.model, inputs, blocks, clock))
        started = clock()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        updates.append(clock() - started)
    spent, lasted = _joules(), time.perf_counter() - since
    forward, backward = (
        [median(run[turn][unit] for run in runs[1:]) for unit in range(len(blocks) + 2)]
        for turn in range(2)
    )
    adapters = [unit.adapter_bytes for unit in counted.units]
    update = median(updates[1:]) / max(sum(adapters), 1.0)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return MeasuredProfile(
        model=counted.name,
        seq_len=seq_len,
        batch=batch,
        forward_s=tuple(forward),
        backward_s=tuple(s + update * size for s, size in zip(backward, adapters, strict=True)),
        memory_bytes=float(pages),
        # A counter that started anew in between tells nothing.
        power_w=(spent - joules) / lasted if spent > joules else None,
    )


def _joules() -> float:
    """Return what the processors' own counters say they used so far; 0 where none may be read."""
    counters = sorted(_COUNTERS.glob("intel-rapl:?/energy_uj"))
    try:
        return sum(int(file.read_text()) for file in counters) / 1e6
    except (OSError, ValueError):
        return 0.0


def unit_seconds(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    blocks: Sequence[str],
    clock: Callable[[], float],
) -> tuple[list[float], list[float]]:
    """Return the forward and the backward time of every unit in one step, in s.

    Units are what comes before the first block, the blocks, and what comes after the last. The
    gradients stay.
    """
    n_units = len(blocks) + 2
    spent = ([0.0] * n_units, [0.0] * n_units)
    at: list[Any] = [0, 0, clock()]  # direction, unit, since when

    def move(direction: int, unit: int, *_: Any) -> None:
        now = clock()
        spent[at[0]][at[1]] += now - at[2]
        at[:] = direction, unit, now

    def leave(unit: int, _module: nn.Module, _args: Any, output: Any) -> None:
        move(0, unit + 1)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                # Called when the gradient of the output is there.
                leaf.register_hook(partial(move, 1, unit))  # type: ignore[no-untyped-call]
                break

    handles = []
    for unit, name in enumerate(blocks, start=1):
        block = model.get_submodule(name)
        handles += [
            block.register_forward_pre_hook(partial(move, 0, unit)),
            block.register_forward_hook(partial(leave, unit)),
        ]
    try:
        loss = model(**inputs).loss
        move(1, n_units - 1)
        loss.backward()
        move(1, 0)
    finally:
        for handle in handles:
            handle.remove()
    return spent
