"""Adapters: what is trained, under the names that the unsplit PEFT model gives it."""

import warnings
from copy import copy

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from fedsplit.errors import FedsplitError
from fedsplit.models.checkpoint import Owns
from fedsplit.models.lora import ADAPTER, check_matches, initialise_layer, lora_config
from fedsplit.models.phantoms import phantom
from fedsplit.models.spec import ModelSpec
from fedsplit.seeds import derive_seed

PEFT_PREFIX = "base_model.model."
_WRAPPED = ("base_layer", "original_module")


def add_adapters(model: PreTrainedModel, spec: ModelSpec, owns: Owns) -> None:
    """Put LoRA layers into `model`; only those on modules that are owned take memory.

    Initial values come from the spec's seed and the layer's name.

    Raises
    ------
    FedsplitError
        If PEFT has no default target modules for the architecture, or none matches.
    """
    config = lora_config(spec, model)
    structure = copy(config)
    structure.init_lora_weights = True  # a tier may not have the weights that others begin with
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            inject_adapter_in_model(structure, model, ADAPTER, low_cpu_mem_usage=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise FedsplitError(
            f"target_modules={spec.target_modules!r}: PEFT cannot place adapters in "
            f"{model.config.model_type!r}; name modules, or use 'all-linear' ({error})"
        ) from error
    adapted: list[str] = []
    whole: list[str] = []
    for path, module in model.named_modules():
        name = base_path(path)
        if isinstance(module, LoraLayer):
            assert isinstance(module, nn.Module)
            adapted.append(name)
            _materialise(module, owns(name))
            if owns(name):
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(derive_seed(spec.seed, "adapter", path))
                    initialise_layer(module, config)
        elif isinstance(module, ModulesToSaveWrapper):
            whole.append(name)
            if not owns(name):
                _materialise(module, False)
    check_matches(spec, adapted, whole, model.config.model_type)


def _materialise(layer: nn.Module, own: bool) -> None:
    """Give the adapter weights of `layer` memory, or make them phantoms.

    Whatever type the frozen weights have, LoRA's are in float32, as PEFT has it.
    """
    for name, parameter in list(layer.named_parameters()):
        if not is_adapter(name):
            continue
        owner, _, short = name.rpartition(".")
        like = parameter.float() if isinstance(layer, LoraLayer) else parameter
        value = torch.empty_like(like, device="cpu") if own else phantom(like)
        layer.get_submodule(owner)._parameters[short] = nn.Parameter(value, requires_grad=own)


def peft_key(name: str) -> str:
    """Return the key that PEFT's saved adapter has for the model's parameter `name`."""
    parts = [part for part in name.split(".") if part not in (ADAPTER, "modules_to_save")]
    if "lora_magnitude_vector" in parts:
        parts.remove("weight")
    return PEFT_PREFIX + ".".join(parts)


def is_adapter(name: str) -> bool:
    """Return whether the model's parameter `name` belongs to an adapter."""
    return ADAPTER in name.split(".")


def adapted_module(name: str) -> str:
    """Return the path of the module that the adapter parameter `name` belongs to."""
    parts = name.split(".")
    first = next(
        index
        for index, part in enumerate(parts)
        if part.startswith("lora_") or part == "modules_to_save"
    )
    return base_path(".".join(parts[:first]))


def base_path(path: str) -> str:
    """Return the path that a module or weight had before adapters were put around it."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPED)
