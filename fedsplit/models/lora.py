"""PEFT's LoRA: its configuration, initial values, and adapters that PEFT saved or is to load."""

import json
import re
import warnings
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedsplit.errors import FedsplitError, SettingsError, require
from fedsplit.models.bottleneck import DOWN, UP
from fedsplit.models.files import few, one_line
from fedsplit.models.lora_fields import ELSEWHERE, changes_base, check_lora
from fedsplit.models.names import CAUSAL, CLASSIFIERS, SEQUENCES
from fedsplit.models.ranks import rank_axis, residual_of, residual_rank, trained
from fedsplit.models.spec import ModelSpec

ADAPTER = "default"


def lora_config(spec: ModelSpec, model: PreTrainedModel | None = None) -> LoraConfig:
    """Return PEFT's configuration for the adapters of `spec`.

    Parameters
    ----------
    spec : ModelSpec
        What is trained.
    model : PreTrainedModel or None
        To take PEFT's default target modules of, where the spec names none, and the names of a
        classifier's head.

    Raises
    ------
    SettingsError
        If PEFT refuses them together.
    """
    fields = dict(spec.lora)
    default = None if model is None else DEFAULT_TARGETS.get(model.config.model_type)
    targets = spec.target_modules or default
    listed = targets if targets is None or isinstance(targets, str) else list(targets)
    tasks = {CAUSAL: "CAUSAL_LM", SEQUENCES: "SEQ_CLS"}
    whole = list(fields.pop("modules_to_save", None) or ())
    if spec.task in CLASSIFIERS and model is not None:
        whole += [name for name in head_modules(model) if name not in whole]
    whole += [DOWN, UP] if spec.bottleneck is not None else []
    try:
        with warnings.catch_warnings():
            # That PiSSA takes more than one line to load: what is exported is plain LoRA.
            warnings.simplefilter("ignore")
            return LoraConfig(
                r=spec.r,
                lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT takes any number
                lora_dropout=spec.dropout,
                target_modules=listed,
                modules_to_save=whole or None,
                task_type=tasks.get(spec.task),
                base_model_name_or_path=spec.source,
                **fields,
            )
    except (ValueError, TypeError) as error:
        allowed = f"what PEFT can make adapters of ({one_line(str(error))})"
        raise SettingsError("lora", dict(spec.lora), allowed) from error


def head_modules(model: PreTrainedModel) -> list[str]:
    """Return the modules of `model` behind its backbone that have weights."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def spared(spec: ModelSpec, model: PreTrainedModel) -> frozenset[str]:
    """Return the last parts of names of modules that cannot be quantised: they are trained."""
    whole = set(lora_config(spec, model).modules_to_save or ())
    embeddings = {n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Embedding}
    listed = spec.target_modules or ()
    # PEFT puts no adapters around quantised embeddings.
    aimed = {name for name in embeddings if name in listed}
    return frozenset(whole | aimed)


def check_matches(spec: ModelSpec, adapted: list[str], whole: list[str], model_type: str) -> None:
    """Refuse settings that no module answers to: PEFT would pass over them in silence.

    Parameters
    ----------
    spec : ModelSpec
        With the settings.
    adapted, whole : list of str
        Paths of modules with an adapter, and of those trained whole.
    model_type : str
        For the message.
    """
    allowed = f"the name of a module of {model_type!r}"
    for name in spec.lora.get("modules_to_save") or ():
        found = any(path == name or path.endswith(f".{name}") for path in whole)
        require(found, "lora.modules_to_save", name, allowed)
    for field in ("rank_pattern", "alpha_pattern"):
        for key in spec.lora.get(field) or {}:
            pattern = re.compile(rf"(.*\.)?({key})$")
            found = any(pattern.match(path) for path in adapted)
            require(found, f"lora.{field}", key, f"{allowed} with an adapter")
    layers = spec.lora.get("layers_to_transform")
    for layer in [layers] if isinstance(layers, int) else layers or ():
        found = any(f".{layer}." in path for path in adapted)
        require(found, "lora.layers_to_transform", layer, "the number of a block with an adapter")


def initialise_layer(layer: LoraLayer, config: LoraConfig) -> None:
    """Give `layer`, whose base weight and adapter are in memory, its initial values.

    Draws from torch's global generator. As PEFT does it when it makes the layer, except that this
    waits until the layer's own part of the model is there.
    """
    init = config.init_lora_weights
    linear = ADAPTER in layer.lora_A
    if init is True or init == "gaussian" or not linear:
        layer.reset_lora_parameters(ADAPTER, init if init == "gaussian" else True)  # type: ignore[no-untyped-call]
    elif init == "orthogonal":
        layer.orthogonal_init(ADAPTER)  # type: ignore[no-untyped-call]
    elif init == "olora":
        layer.olora_init(ADAPTER)  # type: ignore[no-untyped-call]
    else:
        layer.pissa_init(ADAPTER, init)  # type: ignore[no-untyped-call]
    if linear:
        # Some of them take the type of the base weight.
        layer.lora_A[ADAPTER].float()
        layer.lora_B[ADAPTER].float()
        if layer.lora_bias[ADAPTER]:
            nn.init.zeros_(cast("Tensor", layer.lora_B[ADAPTER].bias))
    if ADAPTER in layer.lora_variant:
        variant: Any = layer.lora_variant[ADAPTER]
        variant.init(layer, adapter_name=ADAPTER, config=config)


def as_plain_lora(
    config: LoraConfig, trained: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return adapters that fit the base model as it was before they were taken out of it.

    Adapters of PiSSA and OLoRA belong to what these left of the base weights. What was trained is
    the difference to their initial values, which is LoRA of twice the rank:
    ``B A - B0 A0 = [B, -B0] [A; A0]``, at the same scale.

    Parameters
    ----------
    config : LoraConfig
        What the adapters were made with; others are returned as they are.
    trained, initial : mapping of str to Tensor
        All adapters by PEFT's keys, as they are and as they began.

    Notes
    -----
    As in PEFT's ``save_pretrained(path_initial_model_for_weight_conversion=...)``; Meng, Wang and
    Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", NeurIPS 2024.
    """
    if not changes_base(config.init_lora_weights):
        return config, dict(trained)
    plain = copy(config)
    plain.init_lora_weights = True
    plain.r = 2 * config.r
    growth = 2**0.5 if config.use_rslora else 2
    plain.lora_alpha = config.lora_alpha * growth  # type: ignore[assignment]
    plain.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
    plain.alpha_pattern = {key: a * growth for key, a in (config.alpha_pattern or {}).items()}
    found = dict(trained)
    for name, value in trained.items():
        if name.endswith((".lora_A.weight", ".lora_embedding_A")):
            found[name] = torch.cat([value, initial[name].to(value)], dim=0)
        elif name.endswith((".lora_B.weight", ".lora_embedding_B")):
            found[name] = torch.cat([value, -initial[name].to(value)], dim=1)
    return plain, found


def as_one_lora(
    config: LoraConfig, adapters: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return one adapter that does what `adapters` and the residuals among them do.

    Of a module with factors ``B A`` and a residual ``U V`` that is ``[B, U] [A; V]``, at the same
    scale: plain LoRA of a higher rank, the same for all modules (the rest is zero).
    """
    more = residual_rank(adapters)
    if more == 0:
        return config, dict(adapters)
    found = trained(adapters)
    for name, value in found.items():
        axis, beside = rank_axis(name), adapters.get(residual_of(name) or "")
        if axis is not None:
            shape = [*value.shape]
            shape[axis] = more if beside is None else more - beside.shape[axis]
            parts = [value] if beside is None else [value, beside.to(value)]
            found[name] = torch.cat([*parts, value.new_zeros(shape)], dim=axis)

    def alpha(before: float, rank: int) -> float:
        growth = (rank + more) / rank
        return before * (growth**0.5 if config.use_rslora else growth)

    one, ranks, alphas = copy(config), config.rank_pattern or {}, config.alpha_pattern or {}
    one.r = config.r + more
    one.lora_alpha = alpha(config.lora_alpha, config.r)  # type: ignore[assignment]
    one.rank_pattern = {key: rank + more for key, rank in ranks.items()}
    one.alpha_pattern = {
        key: alpha(alphas.get(key, config.lora_alpha), ranks.get(key, config.r))
        for key in {**alphas, **ranks}
    }
    return one, found


def adapter_settings(folder: str) -> dict[str, Any]:
    """Return the fields of a `ModelSpec` that PEFT's adapter in `folder` was made with.

    Raises
    ------
    FedsplitError
        If it is no adapter, another method's, or made with what cannot be split.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        allowed = f"a folder with PEFT's {CONFIG_NAME} ({one_line(str(error))})"
        raise SettingsError("adapter", folder, allowed) from error
    kind = said.get("peft_type") if isinstance(said, Mapping) else None
    require(kind == "LORA", "adapter", folder, f"an adapter of LoRA; it is one of {kind!r}")
    plain = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    aside = {"peft_version", "task_type", "inference_mode", "base_model_name_or_path", "revision"}
    aside |= {"auto_mapping", "megatron_core", "megatron_config", "runtime_config", *ELSEWHERE}
    differs = {
        name: value
        for name, value in said.items()
        if name not in aside and value not in (plain.get(name), None, {}, [])
    }
    if changes_base(differs.get("init_lora_weights")):
        allowed = "saved as plain LoRA: it belongs to other base weights than the model's own"
        raise SettingsError("adapter", folder, f"{allowed} (init_lora_weights)")
    # How values began does not matter once there are values.
    differs.pop("init_lora_weights", None)
    try:
        lora = check_lora(differs)
    except SettingsError as error:
        allowed = f"an adapter that can be split; {error}"
        raise SettingsError("adapter", folder, allowed) from error
    targets = said.get("target_modules")
    return {
        "adapter": folder,
        "r": said.get("r", plain["r"]),
        "alpha": float(said.get("lora_alpha", plain["lora_alpha"])),
        "dropout": float(said.get("lora_dropout", 0.0)),
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "lora": lora,
    }


def read_adapter(folder: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those values of PEFT's adapter in `folder` that are `expected`, in their types.

    Raises
    ------
    FedsplitError
        If one is missing, has another shape, or is not finite.
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            found = {name: file.get_tensor(name) for name in expected if name in stored}
    except (OSError, SafetensorError) as error:
        allowed = f"a folder with PEFT's {path.name} ({one_line(str(error))})"
        raise SettingsError("adapter", folder, allowed) from error
    missing = sorted(set(expected) - set(found))
    require(not missing, "adapter", folder, f"one with values for {few(missing)}")
    for name, value in found.items():
        want = expected[name]
        fits = value.shape == want.shape and bool(value.isfinite().all())
        allowed = f"an adapter of this model: {name} must be finite, of shape {tuple(want.shape)}"
        require(fits, "adapter", folder, allowed)
    return {name: cast("Tensor", value.to(expected[name])) for name, value in found.items()}


def check_adapter(spec: ModelSpec, expected: Mapping[str, Tensor]) -> None:
    """Refuse an adapter folder that has not just the values that are `expected`.

    Raises
    ------
    FedsplitError
        As `read_adapter`, or if it has more.
    """
    assert spec.adapter is not None
    read_adapter(spec.adapter, expected)
    with safe_open(Path(spec.adapter) / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        odd = sorted(set(file.keys()) - set(expected))
    if odd:
        raise FedsplitError(f"adapter={spec.adapter!r}: has no module in the model for {few(odd)}")
