"""Plain values of a configuration."""

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from fedsplit.errors import FedsplitError


def plain(config: Any) -> dict[str, Any]:
    """Return a part of the configuration as plain Python values."""
    value = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if not isinstance(value, dict):
        raise FedsplitError(f"configuration: {config!r} must be a mapping")
    return {str(key): item for key, item in value.items()}


def without(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return `values` but for those of `names`."""
    return {name: value for name, value in values.items() if name not in names}
