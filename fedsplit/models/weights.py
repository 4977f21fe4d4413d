"""Put weights into a model, and only those it owns.

The model is first built on the meta device, without memory. Owned weights are then read one by
one from memory-mapped safetensors files (or drawn at random); all others become *phantoms*, views
of a single zero, so that a tier never holds another tier's weights, not even while loading.
"""

from collections import defaultdict

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fedsplit.models.blocks import find_blocks
from fedsplit.models.bottleneck import add_bottleneck
from fedsplit.models.checkpoint import Owns, read_weights, stored_dtype
from fedsplit.models.phantoms import is_phantom, phantom
from fedsplit.models.private import guarded_initialisation, initialise, meta_model
from fedsplit.models.quantise import is_quantised, quantised_bytes
from fedsplit.models.spec import AUTO, DTYPES, ModelSpec, model_class
from fedsplit.seeds import derive_seed


def build(spec: ModelSpec, config: PretrainedConfig, owns: Owns) -> PreTrainedModel:
    """Return the model of `spec` with real weights where ``owns(name)``, phantoms elsewhere.

    Random weights (all of them for a spec without source, else a new classifier)
    depend on the seed and on their module's name alone, not on what else is owned.

    Raises
    ------
    FedsplitError
        If the checkpoint is not in safetensors format, cannot be found, or does not hold what is
        owned, and nothing but this model's weights.
    """
    dtype = weights_dtype(spec, config)
    model = meta_model(model_class(config, spec.task), config, dtype)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    absent = None
    if spec.source is not None:
        absent = read_weights(model, spec, owns, dtype)
    _fill_in(model, owns, _to_be_tied(model, absent))
    _initialise(model, spec.seed)
    # Tied to whichever of them the checkpoint has, and not at all if it has both and they differ.
    model.tie_weights(absent, recompute_mapping=absent is None)
    if spec.bottleneck is not None:
        add_bottleneck(model, spec.bottleneck, find_blocks(model), owns, spec.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(spec.train == "full" and name in trained)
    return model


def move(model: nn.Module, device: torch.device) -> None:
    """Bring all weights of `model` to `device`; phantoms stay without memory."""
    for module in model.modules():
        if is_quantised(module) and device.type != "cpu":
            module.to(device)  # with its scales
    for value in (*model.parameters(), *model.buffers()):
        if value.device != device:
            value.data = phantom(value, device) if is_phantom(value) else value.data.to(device)


def weights_dtype(spec: ModelSpec, config: PretrainedConfig) -> torch.dtype:
    """Return the type that the weights of `spec` are read in.

    Raises
    ------
    FedsplitError
        If the checkpoint has to be asked, and cannot be read.
    """
    if spec.dtype != AUTO:
        return DTYPES[spec.dtype]
    if spec.train == "full":
        # Optimizers lose small steps in half precision.
        return torch.float32
    said = getattr(config, "dtype", None)
    if isinstance(said, str):
        said = getattr(torch, said, None)
    if said is None and spec.source is not None:
        said = stored_dtype(spec.source)
    return said if isinstance(said, torch.dtype) else torch.float32


@torch.no_grad()
def stir(model: nn.Module, seed: int) -> None:
    """Move every weight a little, each in a direction drawn from its name.

    Random models hide dependencies behind weights that start at zero; a stirred one does not.
    """
    seen = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen or not value.is_floating_point() or is_phantom(value):
            continue
        seen.add(id(value))
        generator = torch.Generator().manual_seed(derive_seed(seed, "stir", name))
        value += 0.02 * torch.randn(value.shape, generator=generator)


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of memory that `model`'s weights really take."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
    }
    return sum(storages.values()) + quantised_bytes(model)


def _to_be_tied(model: PreTrainedModel, absent: set[str] | None) -> set[str]:
    """Return the weights that will be another one by `tie_weights`: they need no memory before."""
    tied = model.all_tied_weights_keys
    if absent is None:
        return set(tied)
    groups: dict[str, set[str]] = defaultdict(set)
    for name, source in tied.items():
        groups[source] |= {name, source}
    return {name for group in groups.values() if group - absent for name in group & absent}


def _fill_in(model: PreTrainedModel, owns: Owns, tied: set[str]) -> None:
    """Replace what is still on the meta device: phantoms for others' weights, memory for own.

    Those to be `tied` to another weight are phantoms until then.
    """
    stored = set(model.state_dict())
    for prefix, module in model.named_modules():
        tables = (module._parameters, module._buffers)
        for table in tables:
            for short, tensor in list(table.items()):
                if tensor is None or tensor.device.type != "meta":
                    continue
                name = f"{prefix}.{short}" if prefix else short
                own = name not in stored or (owns(name) and name not in tied)
                value = torch.zeros_like(tensor, device="cpu") if own else phantom(tensor)
                if isinstance(tensor, nn.Parameter):
                    value = nn.Parameter(value, requires_grad=False)
                value._is_hf_initialized = not own  # type: ignore[attr-defined]
                table[short] = value


@torch.no_grad()
def _initialise(model: PreTrainedModel, seed: int) -> None:
    """Draw what is not yet initialised, each module from its own seed."""

    def visit(module: nn.Module, name: str, owner: PreTrainedModel) -> None:
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name, owner)
        # torch.manual_seed would also queue calls for accelerators, which is slow and grows.
        torch.default_generator.manual_seed(derive_seed(seed, "weights", name))
        initialise(owner, module)

    with torch.random.fork_rng(devices=[]), guarded_initialisation():
        visit(model, "", model)
