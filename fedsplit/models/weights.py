"""Put weights into a model, and only those it owns.

The model is first built on the meta device, without memory. Owned weights are then read one by
one from memory-mapped safetensors files (or drawn at random); all others become *phantoms*, views
of a single zero, so that a tier never holds another tier's weights, not even while loading.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, _get_resolved_checkpoint_files

from fedsplit.errors import FedsplitError
from fedsplit.models.spec import ModelSpec, model_class
from fedsplit.seeds import derive_seed

Owns = Callable[[str], bool]


def build(
    spec: ModelSpec, config: PretrainedConfig, owns: Owns, device: torch.device
) -> PreTrainedModel:
    """Return the model of `spec` with real weights where ``owns(name)``, phantoms elsewhere.

    Random weights (all of them for a spec without source, else those that the checkpoint lacks)
    depend on the seed and on their module's name alone, not on what else is owned.

    Raises
    ------
    FedsplitError
        If the checkpoint is not in safetensors format, cannot be found or does not fit.
    """
    cls = model_class(config, spec.task)
    with contextlib.ExitStack() as contexts:
        for context in cls.get_init_context(spec.torch_dtype, False, False, False):
            contexts.enter_context(context)
        model = cls(config)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    if spec.source is not None:
        _read(model, spec, owns)
    _fill_in(model, owns, device)
    _initialise(model, spec.seed)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(spec.train == "full" and name in trained)
        if not is_phantom(parameter):
            parameter.data = parameter.data.to(device)
    for buffer in model.buffers():
        if not is_phantom(buffer):
            buffer.data = buffer.data.to(device)
    return model


def phantom(like: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return a tensor of zeros with the shape and type of `like` that takes no memory."""
    return torch.zeros((), dtype=like.dtype, device=device).expand(like.shape)


def is_phantom(tensor: Tensor) -> bool:
    """Return whether `tensor` is a view of a single element."""
    return tensor.numel() > 1 and not any(tensor.stride())


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
    return sum(storages.values())


def _read(model: PreTrainedModel, spec: ModelSpec, owns: Owns) -> None:
    """Load the owned weights of a checkpoint, renamed and converted as transformers does it."""
    mapping: list[Any] = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected = model.state_dict()

    def target(key: str) -> str:
        prefix = model.base_model_prefix
        name, _ = rename_source_key(key, renamings, converters, prefix, expected)
        return name if name in expected else rename_source_key(key, [], [], prefix, expected)[0]

    with contextlib.ExitStack() as files:
        slices: dict[str, Any] = {}
        for path in _checkpoint_files(spec):
            file = files.enter_context(safe_open(path, framework="pt"))
            slices |= {
                key: file.get_slice(key)
                for key in file.keys()  # noqa: SIM118 - not a mapping
                if target(key) in expected and owns(target(key))
            }
        with _quiet_bars():
            info, _ = convert_and_load_state_dict_in_model(
                model, slices, LoadStateDictConfig(dtype=spec.torch_dtype, weight_mapping=mapping)
            )
    if info.mismatched_keys or info.conversion_errors:
        wrong = sorted(str(key) for key in [*info.mismatched_keys, *info.conversion_errors])
        raise FedsplitError(
            f"source={spec.source!r}: its weights do not fit the configuration: {wrong[:3]}"
        )


def _checkpoint_files(spec: ModelSpec) -> list[str]:
    try:
        files, _ = _get_resolved_checkpoint_files(
            pretrained_model_name_or_path=spec.source,
            variant=None,
            gguf_file=None,
            use_safetensors=True,
            user_agent=None,
            is_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise FedsplitError(
            f"source={spec.source!r}: must be a checkpoint in safetensors format; others "
            f"(pytorch_model.bin) cannot be read segment by segment, so save it again with "
            f"`save_pretrained` first ({error})"
        ) from error
    return list(files or [])


def _fill_in(model: PreTrainedModel, owns: Owns, device: torch.device) -> None:
    """Replace what is still on the meta device: phantoms for others' weights, memory for own."""
    stored = set(model.state_dict())
    for prefix, module in model.named_modules():
        tables = (module._parameters, module._buffers)
        for table in tables:
            for short, tensor in list(table.items()):
                if tensor is None or tensor.device.type != "meta":
                    continue
                name = f"{prefix}.{short}" if prefix else short
                own = name not in stored or owns(name)
                value = torch.zeros_like(tensor, device="cpu") if own else phantom(tensor, device)
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
        owner._initialize_weights(module)

    with torch.random.fork_rng(devices=[]), initialization.guard_torch_init_functions():
        visit(model, "", model)


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    """Keep transformers' progress bar off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
