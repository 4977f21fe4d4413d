"""Which fields of PEFT's `LoraConfig` a model may be trained with, and their values.

A field is handed through if it says something of each layer by itself, so that a tier can do its
part without the others. The rest is refused, with the reason.
"""

import re
from collections.abc import Mapping
from typing import Any

from fedsplit.errors import SettingsError, require, require_known
from fedsplit.mapping import convert

FIELDS: dict[str, Any] = {
    "use_rslora": bool,
    "use_dora": bool,
    "init_lora_weights": bool | str,
    "lora_bias": bool,
    "rank_pattern": Mapping[str, int],
    "alpha_pattern": Mapping[str, float],
    "layers_to_transform": int | list[int] | None,
    "layers_pattern": str | list[str] | None,
    "exclude_modules": str | list[str] | None,
    "modules_to_save": list[str] | None,
    "fan_in_fan_out": bool,
}
"""Fields of `LoraConfig` that ``model.lora`` may set, and their types."""

ELSEWHERE = {
    "r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
}
_DATA = "absent: it starts from gradients or activations of data, which no tier sees whole"
REFUSED = {
    "bias": "absent: biases belong to the frozen model that all branches share",
    "trainable_token_indices": "absent: name the embeddings in modules_to_save",
    "target_parameters": "absent: name modules in target_modules",
    "layer_replication": "absent: it changes how many blocks there are to cut",
    "loftq_config": "absent; model.quantize keeps frozen weights small",
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"), _DATA),
}
_INITS = ("true", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_N")
_NITER = re.compile(r"pissa_niter_\d+")


def check_lora(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings ``model.lora``, each of the type that PEFT has it.

    Raises
    ------
    SettingsError
        If one is unknown, of the wrong type, or cannot be split; names it as ``lora.field``.
    """
    checked = {}
    for name, value in fields.items():
        where = f"lora.{name}"
        if name in ELSEWHERE:
            raise SettingsError(where, value, f"given as model.{ELSEWHERE[name]}")
        if name in REFUSED:
            raise SettingsError(where, value, REFUSED[name])
        require_known(where, value, FIELDS)
        checked[name] = convert(FIELDS[name], value, where)
    init = checked.get("init_lora_weights", True)
    known = init is True or init in _INITS[1:-1] or bool(_NITER.fullmatch(str(init)))
    require(known, "lora.init_lora_weights", init, f"one of {', '.join(_INITS)}")
    for name, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
        for key, value in checked.get(name, {}).items():
            field = f"lora.{name}.{key}"
            positive = least <= value < float("inf") and value > 0
            require(positive, field, value, "a finite number above 0")
            require(_is_pattern(key), field, value, "under a regular expression of module names")
    if checked.get("use_dora") and changes_base(init):
        raise SettingsError("lora.init_lora_weights", init, "another one with lora.use_dora")
    return checked


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def changes_base(init: object) -> bool:
    """Return whether the initial values `init` are taken out of the frozen weights."""
    return str(init).startswith(("pissa", "olora"))
