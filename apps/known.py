"""Which settings there are, and which was meant by one that there is not."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from fedsplit.errors import SettingsError, require

from .overrides import config_dir, groups


def require_known(known: Mapping[str, Any], key: str, value: object, opened: Sequence[str]) -> None:
    """Refuse a setting that is not in the mapping `known`, unless it is below one of `opened`."""
    if any(key.startswith(f"{name}.") for name in opened):
        return
    node: Any = known
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            raise SettingsError(key, value, _nearest(known, key, node))
        node = node[part]
    if isinstance(node, Mapping):
        names = ", ".join(map(str, node)) or "settings"
        require(isinstance(value, Mapping), key, value, f"a mapping of {names}")
    if isinstance(value, Mapping) and isinstance(node, Mapping) and key not in opened:
        for name, item in value.items():
            require_known(known, f"{key}.{name}", item, opened)


def _nearest(known: Mapping[str, Any], key: str, node: object) -> str:
    """Say what is known in place of `key`, whose part before the unknown one is `node`."""
    parent, dot, name = key.rpartition(".")
    if others := _files_with(key):
        return f"absent, or given with {' or '.join(others)}"
    root = key.partition(".")[0]
    places = [place for place in _places(known) if not parent or place.startswith(f"{root}.")]
    siblings = [str(item) for item in node] if isinstance(node, Mapping) else []
    near = (
        [f"{parent}{dot}{item}" for item in difflib.get_close_matches(name, siblings, n=1)]
        or [place for place in places if place.rpartition(".")[2] == name]
        or difflib.get_close_matches(key, places, n=1, cutoff=0.8)
    )
    if near:
        return f"a known setting; the nearest is {near[0]}"
    return f"a known setting{f' of {parent}' if parent else ''}: {', '.join(siblings)}"


def _files_with(key: str) -> list[str]:
    """Return the choices of its group that would know `key`."""
    group, _, rest = key.partition(".")
    files = {
        name: OmegaConf.load(config_dir() / group / f"{name}.yaml")
        for name in groups().get(group, ())
    }
    return [
        f"{group}={name}"
        for name, file in files.items()
        if _holds(OmegaConf.to_container(file, resolve=False), rest)
    ]


def _holds(values: object, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def _places(known: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in known.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _places(value, f"{prefix}{name}.")
