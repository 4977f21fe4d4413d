"""What a user writes behind a command: KEY=VALUE in Hydra's notation, but paths as they are."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override as HydraOverride
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from fedsplit.errors import FedsplitError, SettingsError, require, require_choice

PATHS = (
    "channel.trace_file",
    "channel.trace_uplink_file",
    "data.path",
    "data.test_path",
    "evaluate.central",
    "fleet.csv",
    "fleet.server_profile",
    "link.certificate",
    "link.key",
    "link.login",
    "link.root",
    "model.adapter",
    "output",
    "privacy.audit",
    "resume",
)
"""Settings that are a file or folder."""
LISTS_OF_PATHS = ("fleet.data",)
"""Settings that are a list of files or folders."""
PATHS_OR_NAMES = ("data.name", "model.source", "strategy.codec_table")
"""Settings that are a file or folder if there is one called so, else a name."""
OPEN = (
    "aggregator",
    "codec.downlink",
    "codec.uplink",
    "fleet.processors",
    "model.config",
    "model.lora",
    "strategy.cut",
    "strategy.learning",
    "train.optimizer.options",
)
"""Mappings whose keys whoever is built from them knows, not conf/."""

# `data=text path=notes.txt` reads better than `data.path`, and nothing else is called so.
_SHORT = {"path": "data.path", "name": "data.name"}
_WRITTEN = re.compile(r"\+{0,2}(?P<key>[A-Za-z_][\w.-]*)=(?P<value>.*)", re.DOTALL)
_QUOTED = re.compile(r"(['\"]).*\1", re.DOTALL)
_HYDRAS_OWN = re.compile(r"\+{0,2}(hydra[./][\w./-]*)=(.*)", re.DOTALL)
STUDY = "study"
"""Stands for the overrides of a file, where several runs are asked for (`.sweep`)."""
_NO_GROUPS = ("deploy", STUDY)
_PACKAGED = "package:"
_SCHEMES = "fedsplit.strategies"


@dataclass(frozen=True)
class Override:
    """One change of the configuration.

    Parameters
    ----------
    key : str
        Dotted name of a setting, or name of a group.
    value : object
        What it is set to, or the name of the group's file.
    text : str
        The same as text that does not depend on the working folder and parses to this again.
    is_choice : bool
        Whether it chooses a file of a group.
    """

    key: str
    value: Any
    text: str
    is_choice: bool = False


def config_dir() -> Path:
    """Return the folder of the configuration: in the wheel beside this file, else at the root."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "conf", here.parent / "conf") if path.is_dir())


@cache
def groups() -> Mapping[str, tuple[str, ...]]:
    """Return the names of the files of each group of the configuration."""
    folders = sorted(path for path in config_dir().iterdir() if path.is_dir())
    named = {
        path.name: tuple(sorted(file.stem for file in path.glob("*.yaml"))) for path in folders
    }
    return {name: files for name, files in named.items() if name not in _NO_GROUPS}


def parse(texts: Sequence[str]) -> list[Override]:
    """Return what `texts` change, in order.

    Raises
    ------
    FedsplitError
        If one is not written as it must be, or chooses what does not exist.
    """
    return [override for text in texts for override in _parse(text)]


def expand_sweeps(texts: Sequence[str], multirun: bool) -> list[list[str]]:
    """Return, for each of `texts`, the overrides that it sweeps over (``a=1,2``, ``glob(*)``).

    Raises
    ------
    FedsplitError
        If one cannot be parsed, or sweeps without `multirun`.
    """
    return [_values_of(text, multirun) for text in texts]


def _values_of(text: str, multirun: bool) -> list[str]:
    key, value = split(text)
    try:
        swept = _hydra(f"{key}={value}")
    except HydraException:
        return [text]
    if not swept.is_sweep_override() or (_is_path(key) and not multirun):
        return [text]
    require(multirun, key, value, "one value; several need --multirun (-m)")
    try:
        items = list(swept.sweep_string_iterator())
        # Hydra escapes what it sweeps over; a path is taken as it stands there.
        return [f"{key}={_plain(item) if _is_path(key) else item}" for item in items]
    except (HydraException, ValueError, TypeError) as error:
        raise _unparsable(key, value, error) from error


def _plain(escaped: str) -> str:
    """Return a path in Hydra's notation as `_unquoted` reads it."""
    value = _hydra(f"x={escaped}").value()
    text = "null" if value is None else str(value)
    return text if _unquoted(text) == value else quoted(text)


def _parse(text: str) -> Iterator[Override]:
    key, value = split(text)
    require(key != STUDY, key, value, "with --multirun (-m)")
    if key in groups() and not value.startswith("{"):
        yield from _choice(key, _unquoted(value) if key == "model" else _value(key, value))
    elif _is_path(key):
        path = absolute_path(key, _unquoted(value))
        yield Override(key, path, f"{key}={quoted(path)}")
    elif key in LISTS_OF_PATHS and isinstance(given := _value(key, value), list):
        paths = [absolute_path(key, str(item)) for item in given]
        yield Override(key, paths, f"{key}=[{','.join(map(quoted, paths))}]")
    else:
        yield Override(key, _value(key, value), f"{key}={value}")


def split(text: str) -> tuple[str, str]:
    """Return the key, whole, and the value of KEY=VALUE as they are written.

    Raises
    ------
    FedsplitError
        If `text` is not written so.
    """
    if hydras := _HYDRAS_OWN.fullmatch(text):
        served = "absent; with -m, runs follow one another (Hydra's basic launcher and sweeper)"
        raise SettingsError(hydras[1], hydras[2], served)
    written = _WRITTEN.fullmatch(text)
    if written is None:
        removing = "; a setting cannot be removed" if text.startswith("~") else ""
        raise SettingsError("override", text, f"written KEY=VALUE, as in rounds=3{removing}")
    key = written["key"]
    return _SHORT.get(key, key), written["value"]


def _choice(group: str, name: Any) -> Iterator[Override]:
    """Choose a file of a group; any model, and any installed scheme, goes without one."""
    known: Sequence[str] = groups()[group]
    if group == "model" and name not in known:
        require(bool(name), "model", name, "the name or folder of a checkpoint")
        source = absolute_path("model.source", name)
        yield Override("model", "checkpoint", "model=checkpoint", is_choice=True)
        yield Override("model.source", source, f"model.source={quoted(source)}")
        return
    if group == "strategy":
        known = sorted({*known, *(entry.name for entry in entry_points(group=_SCHEMES))})
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    if name not in known and near:
        listed = ", ".join(known)
        raise SettingsError(group, name, f"one of {listed}; the nearest is {near[0]}")
    require_choice(group, name, known)
    yield Override(group, name, f"{group}={name}", is_choice=True)


def _is_path(key: str) -> bool:
    return key in PATHS or key in PATHS_OR_NAMES or key == "model"


def _unquoted(value: str) -> str | None:
    """Return a path as it was meant: nothing in it is notation but quotes around it, and null."""
    if value == "null":
        return None
    if _QUOTED.fullmatch(value):
        try:
            return str(_hydra(f"x={value}").value())
        except HydraException:
            return value
    return value


def quoted(text: str | None) -> str:
    """Return `text` in Hydra's notation."""
    return "null" if text is None else QuotedString(text, Quote.single).with_quotes()


def absolute_path(key: str, text: str | None) -> str | None:
    """Return the path that the setting `key` names, whatever the working folder.

    A name that is no path, of a model on the hub say, is returned as it is.
    """
    if text is None or "${" in text or text.startswith(_PACKAGED):
        return text
    require(bool(text), key, text, "a path, or null")
    require("\0" not in text, key, text, "a path without null characters")
    path = os.path.expanduser(text)
    is_path = key in (*PATHS, *LISTS_OF_PATHS) or path != text or os.path.lexists(path)
    return os.path.abspath(path) if is_path else text


def _value(key: str, text: str) -> Any:
    try:
        parsed = _hydra(f"{key}={text}")
        several = parsed.is_sweep_override()
        require(
            not several, key, text, "one value, not several (plan and run take several with -m)"
        )
        return parsed.value()
    except HydraException as error:
        raise _unparsable(key, text, error) from error


def _unparsable(key: str, text: str, error: Exception) -> FedsplitError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    allowed = f"written in Hydra's notation, other text in quotes as in {key}=\"'...'\" ({reason})"
    return SettingsError(key, text, allowed)


def _hydra(text: str) -> HydraOverride:
    """Parse with Hydra's grammar."""
    # Hydra keeps its state globally; whoever composed before must not be in the way.
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return OverridesParser.create(config_loader=loader).parse_overrides([text])[0]
