"""Trained weights in the formats that other programs load."""

import contextlib
import shutil
import warnings
from collections.abc import Mapping
from copy import copy
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME
from transformers.utils.hub import cached_file

from fedsplit.errors import FedsplitError, require
from fedsplit.models import SplitModel, read_tokenizer
from fedsplit.models.lora import ADAPTER, as_one_lora, as_plain_lora, lora_config
from fedsplit.models.names import IMAGES
from fedsplit.models.private import quiet_bars
from fedsplit.models.residuals import RESIDUAL

_PREFIX = "base_model.model."


def save_adapter(
    folder: Path, adapters: Mapping[str, Tensor], config: LoraConfig, base_model: str
) -> None:
    """Write adapters in PEFT's format, for ``PeftModel.from_pretrained(model, folder)``.

    Parameters
    ----------
    folder : Path
        Gets adapter_config.json and adapter_model.safetensors.
    adapters : mapping of str to Tensor
        Every adapter of the model, by its key in PEFT's saved adapters.
    config : LoraConfig
        The configuration that the adapters were made with.
    base_model : str
        Hub name or folder of the model that they adapt.

    Raises
    ------
    FedsplitError
        If there is no adapter or a name is not a key of PEFT's.
    """
    require(len(adapters) > 0, "adapters", "", "at least one")
    for name in adapters:
        # PEFT only warns about keys that it does not know and leaves the initial values there.
        require(name.startswith(_PREFIX), "adapter", name, f"a name that starts with {_PREFIX}")
    saved = copy(config)
    saved.base_model_name_or_path = base_model
    saved.inference_mode = True
    if saved.target_modules is None or saved.target_modules == "all-linear":
        modules = (name.partition(".lora_")[0] for name in adapters if ".lora_" in name)
        saved.target_modules = sorted({module.rpartition(".")[2] for module in modules})
    folder.mkdir(parents=True, exist_ok=True)
    saved.save_pretrained(str(folder))
    _save(folder / SAFETENSORS_WEIGHTS_NAME, adapters)


def save_trained(
    folder: Path,
    weights: Mapping[str, Tensor],
    model: SplitModel,
    initial: Mapping[str, Tensor],
) -> None:
    """Write what was trained of `model`: its adapter for PEFT, or all of it for transformers.

    `initial` are the values that its adapters began with: some were taken out of the base weights.
    """
    spec = model.spec
    if spec.train == "lora":
        config, adapters = as_plain_lora(lora_config(spec, model.model), weights, initial)
        config, adapters = as_one_lora(config, adapters)
        save_adapter(folder, adapters, config, spec.source or str(spec.model_type))
    else:
        save_model(folder, weights, model)


def save_model(folder: Path, weights: Mapping[str, Tensor], model: SplitModel) -> None:
    """Write a model trained whole, or its adapters merged into it, for ``from_pretrained(folder)``.

    Merged, `model` has no adapters any more; weights in a type of 16 bits are rounded to it.

    Parameters
    ----------
    folder : Path
        Gets weights and configuration; the tokenizer or image processor and the generation
        settings of the checkpoint, where there was one; all as transformers saves them.
    weights : mapping of str to Tensor
        What was trained, by name.
    model : SplitModel
        The whole model; `weights` are installed in it.

    Raises
    ------
    FedsplitError
        If a weight is not the model's.
    """
    model.put(weights)
    inner, source = model.model, model.spec.source
    if model.spec.train == "lora":
        _merge(inner)
    config = model.spec.restore(inner.config)
    held = inner.config
    inner.config = config
    if inner.can_generate():
        inner.generation_config = _generation_config(source, config)
    try:
        with quiet_bars():
            inner.save_pretrained(folder)
    finally:
        inner.config = held
    if source is None:
        return
    if model.spec.task != IMAGES:
        try:
            read_tokenizer(source).save_pretrained(folder)
        except FedsplitError as error:
            # The weights are safe by now; data of a user's own may need no tokenizer.
            warnings.warn(f"{folder} has no tokenizer: {error}", stacklevel=2)
    with contextlib.suppress(OSError):
        if (found := cached_file(source, IMAGE_PROCESSOR_NAME)) is not None:
            shutil.copy(found, folder)


def _merge(model: PreTrainedModel) -> None:
    """Put adapters into the weights that they adapt, and plain modules in their layers' place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            held = [name for name in (ADAPTER, RESIDUAL) if name in module.active_adapters]
            module.merge(safe_merge=True, adapter_names=held)
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[ADAPTER])


def _generation_config(source: str | None, config: PretrainedConfig) -> GenerationConfig:
    """Return the checkpoint's settings of generation, or what the configuration says of them."""
    if source is not None:
        with contextlib.suppress(OSError):
            return GenerationConfig.from_pretrained(source)
    return GenerationConfig.from_model_config(config)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device to a safetensors file that transformers and PEFT accept."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})
