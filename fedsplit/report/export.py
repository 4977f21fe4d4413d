"""Trained weights in the formats that other programs load."""

from collections.abc import Mapping
from copy import copy
from pathlib import Path

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_NAME

from fedsplit.errors import require

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


def save_model(folder: Path, weights: Mapping[str, Tensor], config: PretrainedConfig) -> None:
    """Write all weights of a model, for ``from_pretrained(folder)``.

    Parameters
    ----------
    folder : Path
        Gets config.json and model.safetensors.
    weights : mapping of str to Tensor
        The model's state dict; tied weights once.
    config : PretrainedConfig
        The model's configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    _save(folder / SAFE_WEIGHTS_NAME, weights)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device to a safetensors file that transformers and PEFT accept."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})
