"""Builds what a tier holds of a model: weights of its own segments, and adapters on them."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fedsplit.models.adapters import add_adapters
from fedsplit.models.anatomy import EMBED, Anatomy, anatomy
from fedsplit.models.bottleneck import DOWN, Bottleneck, principal
from fedsplit.models.lora import read_adapter, spared
from fedsplit.models.names import IMAGES
from fedsplit.models.quantise import quantise
from fedsplit.models.spec import ModelSpec
from fedsplit.models.split import SplitModel, positions_of
from fedsplit.models.weights import build, move
from fedsplit.plan import DEVICE, Segment
from fedsplit.seeds import derive_seed

# Building on the meta device patches torch's modules for the whole process.
_BUILDING = threading.Lock()
_TEXTS, _TOKENS = 32, 32


def load(
    spec: ModelSpec, segments: Sequence[Segment] | None = None, device: str | torch.device = "cpu"
) -> SplitModel:
    """Build a model with its adapters, holding only what `segments` need.

    Parameters
    ----------
    spec : ModelSpec
        Which model, and what of it is trained.
    segments : sequence of Segment or None
        What this tier runs; None for everything.
    device : str or torch.device
        Where the weights go.

    Raises
    ------
    FedsplitError
        If the model is unknown, cannot be cut, or its checkpoint cannot be read by segments.
    """
    model = assemble(spec, spec.load_config(), segments, torch.device(device))
    if spec.adapter is not None:
        held = model.trained()
        model.install(
            {name: nn.Parameter(v) for name, v in read_adapter(spec.adapter, held).items()}
        )
    elif spec.bottleneck is not None and segments is None and spec.task != IMAGES:
        model.put(_principal(model, spec.bottleneck))
    return model


@torch.no_grad()
def _principal(model: SplitModel, bottleneck: Bottleneck) -> dict[str, Tensor]:
    """Return a bottleneck that keeps most of what random texts make of the blocks before it.

    Nobody's texts are needed. Whoever hands out the first adapters holds the whole model.
    """
    draw = torch.Generator().manual_seed(derive_seed(model.spec.seed, "principal"))
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (_TEXTS, _TOKENS), generator=draw).to(model.model.device)
    seen: list[Tensor] = []
    down = next(m for name, m in model.model.named_modules() if name.endswith(f".{DOWN}"))
    handle = down.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    device = Segment(DEVICE, 0, bottleneck.after)
    try:
        model.run(device, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    finally:
        handle.remove()
    found = principal(seen[0].flatten(0, 1).cpu(), bottleneck.width)
    names = model.adapter_names(Segment(DEVICE, 0, model.n_blocks))
    return {name: v for name in names for end, v in found.items() if name.endswith(end)}


def assemble(
    spec: ModelSpec,
    config: PretrainedConfig,
    segments: Sequence[Segment] | None,
    device: torch.device,
) -> SplitModel:
    """Build a model of `config` as `load` does; `spec` gives the weights and what is trained."""
    parts = parts_of(spec, config)
    if segments is None:
        segments = [Segment(DEVICE, 0, parts.n_blocks)]
    owned, read = owned_and_read(spec, segments, parts.n_blocks)
    model = assemble_model(spec, config, parts, read, device)
    return SplitModel(spec, config, model, parts, owned)


def parts_of(spec: ModelSpec, config: PretrainedConfig) -> Anatomy:
    """Return the anatomy of the model of `spec`, with what `spec` puts into it."""
    parts = anatomy(config, spec.task)
    if spec.bottleneck is None or spec.bottleneck.after >= parts.n_blocks:
        return parts
    added = spec.bottleneck.positions(parts.blocks)
    return replace(parts, positions={**parts.positions, **added})


def owned_and_read(
    spec: ModelSpec, segments: Sequence[Segment], n_blocks: int
) -> tuple[frozenset[int], frozenset[int]]:
    """Return the positions that a tier with `segments` runs, and those whose weights it needs."""
    owned = frozenset().union(*(positions_of(segment, n_blocks) for segment in segments))
    # Token ids are of use only together with the embeddings, which stay frozen there.
    return owned, owned | {EMBED} if spec.share_token_ids else owned


def assemble_model(
    spec: ModelSpec,
    config: PretrainedConfig,
    parts: Anatomy,
    read: frozenset[int],
    device: torch.device,
) -> PreTrainedModel:
    """Return a model that holds the weights of the positions `read`, with its adapters."""
    with _BUILDING:

        def runs(module: str) -> bool:
            return not read.isdisjoint(parts.of_module(module))

        model = build(spec, config, lambda name: not read.isdisjoint(parts.positions[name]))
        if spec.quantize is not None:
            quantise(model, spec.quantize, runs, spared(spec, model))
        if spec.train == "lora":
            add_adapters(model, spec, runs)
        move(model, device)
    return model
