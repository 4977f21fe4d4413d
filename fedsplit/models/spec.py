"""Which model to train, and how: settings that travel between tiers as JSON."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from fedsplit.errors import FedsplitError, require, require_choice
from fedsplit.models.bottleneck import Bottleneck
from fedsplit.models.files import PLAIN, is_lfs_pointer, one_line
from fedsplit.models.lora_fields import changes_base, check_lora
from fedsplit.models.names import CAUSAL, IMAGES, INT8, QUANTISED, SEQUENCES

TASKS = {
    CAUSAL: AutoModelForCausalLM,
    IMAGES: AutoModelForImageClassification,
    SEQUENCES: AutoModelForSequenceClassification,
}
AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRAIN = ("lora", "full")
_CHANGED = ("use_cache", "rescale_every")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model and what of it is trained. Every field is plain, so `dataclasses.asdict` is JSON.

    Parameters
    ----------
    source : str or None
        Hub name or local folder of a checkpoint in safetensors format.
    model_type : str or None
        Instead of `source`: architecture (as transformers names it) to start from random weights.
    config : mapping
        Fields of the model's configuration to override, e.g. ``{"num_hidden_layers": 4}``.
    task : str
        "causal-lm", "sequence-classification" or "image-classification".
    dtype : str
        Type of the frozen weights: "float32", "bfloat16", "float16", or "auto", the checkpoint's
        own as `transformers` understands it: what its configuration says, else what is stored.
        What is trained stays in float32 with "auto", so ``train: full`` is in float32.
    train : str
        "lora" trains low-rank adapters (and, for classification, the head), "full" trains every
        parameter.
    r, alpha, dropout
        Rank, scale numerator and dropout of LoRA. Devices of lower ranks train the first components
        of such an adapter, at its scale.
    freeze_a : bool
        Whether LoRA's A stays as it was drawn and B alone is trained (FFA-LoRA).
    target_modules : str, tuple of str or None
        Modules that get an adapter; None takes PEFT's own choice for the architecture,
        "all-linear" every linear layer.
    lora : mapping
        More fields of PEFT's `LoraConfig`, such as ``{"use_rslora": True}``; those that can be
        split (`fedsplit.models.lora_fields`).
    adapter : str or None
        Folder of an adapter that PEFT saved, to start from. Its settings are to stand in `r`,
        `alpha`, `dropout`, `target_modules` and `lora`: see `fedsplit.models.adapter_settings`.
    quantize : str or None
        "int8" or "nf4" keeps frozen weights in 8 or 4 bits (`fedsplit.models.quantise`).
    seed : int
        Seed of random weights and of the adapters' initial values; each value depends on the seed
        and on its parameter's name alone.
    share_token_ids : bool
        Whether token ids may leave the device, for the few models that need them further on.
    bottleneck : Bottleneck or None
        Where the model is narrow; trained beside LoRA.
    """

    source: str | None = None
    model_type: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    task: str = CAUSAL
    dtype: str = AUTO
    train: str = "lora"
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    freeze_a: bool = False
    target_modules: str | tuple[str, ...] | None = None
    lora: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    quantize: str | None = None
    seed: int = 0
    share_token_ids: bool = False
    bottleneck: Bottleneck | None = None

    def __post_init__(self) -> None:
        one = (self.source is None) != (self.model_type is None)
        require(one, "source", self.source, f"given, or model_type={self.model_type}, and not both")
        require_choice("task", self.task, TASKS)
        require_choice("dtype", self.dtype, [AUTO, *DTYPES])
        require_choice("train", self.train, TRAIN)
        require(self.r >= 1, "r", self.r, "at least 1")
        require(0 < self.alpha < float("inf"), "alpha", self.alpha, "positive and finite")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        object.__setattr__(self, "lora", check_lora(self.lora))
        require_choice("quantize", self.quantize, [None, *QUANTISED])
        init = self.lora.get("init_lora_weights", True)
        plain = self.quantize is None or not changes_base(init)
        require(plain, "lora.init_lora_weights", init, "one that leaves quantised weights alone")
        # PEFT cannot tell the norm of such a weight before its adapter is in memory.
        dora = bool(self.lora.get("use_dora")) and self.quantize == INT8
        require(not dora, "lora.use_dora", True, "false with quantize=int8")
        plain = self.bottleneck is None or self.train == "lora"
        require(plain, "train", self.train, "lora with a bottleneck")
        for name in ("lora", "adapter", "quantize", "freeze_a"):
            given = getattr(self, name)
            require(not given or self.train == "lora", name, given, "absent with train=full")

    def load_config(self) -> PretrainedConfig:
        """Return the model's configuration with the overrides applied, fit for training.

        Raises
        ------
        FedsplitError
            If the source or architecture is unknown, the configuration refuses an override, or the
            checkpoint is quantised.
        """
        return usable_config(self.read_config(), self.task)

    def read_config(self) -> PretrainedConfig:
        """Return the checkpoint's own configuration with the overrides applied, nothing else.

        Raises
        ------
        FedsplitError
            As `load_config`.
        """
        overrides = dict(self.config)
        config: PretrainedConfig
        try:
            if self.source is not None:
                config = AutoConfig.from_pretrained(self.source, **overrides)
            else:
                config = AutoConfig.for_model(str(self.model_type), **overrides)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            name = "source" if self.source is not None else "model_type"
            raise FedsplitError(
                f"{name}={getattr(self, name)!r}: no model configuration could be made of it with "
                f"config={overrides!r} ({one_line(str(error))}){self._why_no_config()}"
            ) from error
        quantisation = getattr(config, "quantization_config", None)
        if quantisation is not None:
            fields = quantisation if isinstance(quantisation, Mapping) else vars(quantisation)
            method = one_line(str(fields.get("quant_method", "unknown")))
            raise FedsplitError(
                f"source={self.source!r}: quantization_config ({method}) must be absent; {PLAIN}"
            )
        return config

    def restore(self, config: PretrainedConfig) -> PretrainedConfig:
        """Return a copy of `config` with what `usable_config` changed as the checkpoint had it."""
        own = self.read_config()
        if type(own) is not type(config):
            own = own.get_text_config()
        restored = copy.deepcopy(config)
        for name in _CHANGED:
            if hasattr(own, name):
                setattr(restored, name, getattr(own, name))
        return restored

    def _why_no_config(self) -> str:
        """Return what else the source is, if it is something known."""
        folder = Path(self.source or "")
        if self.source is None:
            return ""
        if folder.is_absolute() and not folder.is_dir():
            return "; there is no such folder"
        if not folder.is_dir():
            return ""
        if is_lfs_pointer(folder / "config.json"):
            return "; config.json is a Git LFS pointer, not the file: fetch it (git lfs pull)"
        if (folder / "adapter_config.json").is_file():
            return "; it is an adapter: name the model that it adapts, or merge it into that"
        return ""


def usable_config(config: PretrainedConfig, task: str) -> PretrainedConfig:
    """Return the configuration that the model class of `task` takes, without a cache.

    Of a multimodal configuration that is its text part, where transformers' causal model for it
    is a text model.
    """
    wanted = model_class(config, task).config_class
    if wanted is not type(config) and wanted is config.sub_configs.get("text_config"):
        config = config.get_text_config()
    config.use_cache = False
    text = config.get_text_config()
    if task == SEQUENCES and config.is_encoder_decoder:
        raise FedsplitError(
            f"model_type={config.model_type!r}: must be a decoder or an encoder, not both: what an "
            "encoder hands to all blocks of a decoder crosses no cut"
        )
    if task == SEQUENCES and getattr(text, "pad_token_id", None) is None:
        # A sample is judged by its last token before the padding.
        ends = getattr(text, "eos_token_id", None)
        text.pad_token_id = (ends[0] if isinstance(ends, list) else ends) or 0
    for name in ("layerdrop", "decoder_layerdrop"):
        rate = getattr(text, name, 0)
        if rate:
            raise FedsplitError(
                f"config.{name}={rate}: must be 0: each tier would draw for itself which blocks a "
                "step leaves out"
            )
    if hasattr(config, "rescale_every"):
        # RWKV would divide the weights of all blocks, in place, in evaluation mode.
        config.rescale_every = 0
    return config


def model_class(config: PretrainedConfig, task: str) -> type[PreTrainedModel]:
    """Return transformers' class for `config` and `task`.

    Raises
    ------
    FedsplitError
        If transformers has none.
    """
    mapping: Any = TASKS[task]._model_mapping
    if type(config) in mapping:
        found = mapping[type(config)]
        chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
        return chosen
    # The text part of a multimodal configuration is known by its model class only.
    for cls in mapping.values():
        if getattr(cls, "config_class", None) is type(config):
            text_model: type[PreTrainedModel] = cls
            return text_model
    raise FedsplitError(f"model_type={config.model_type!r}: has no {task} model")
