"""Several settings at once, as behind ``-m``: which scenarios or runs they are."""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedsplit.errors import FedsplitError, SettingsError, require

from .overrides import STUDY, config_dir, expand_sweeps, parse, split

_LONGEST_NAME = 120
_NOT_IN_NAMES = re.compile(r"[^\w.,=+-]+")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of the combinations that are swept over.

    Parameters
    ----------
    name : str
        What is swept over and its values, short; ``default`` where nothing is.
    overrides : tuple of str
        The configuration.
    swept : mapping of str to str
        What is swept over, by its whole key, and the values as they are written.
    """

    name: str
    overrides: tuple[str, ...]
    swept: Mapping[str, str]

    @property
    def folder(self) -> str:
        """The name of a folder for it, the same however many others there are."""
        plain = ",".join(f"{key}={value}" for key, value in self.swept.items()) or "default"
        name = _NOT_IN_NAMES.sub("_", plain)
        if name == plain and len(name) <= _LONGEST_NAME:
            return name
        return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"

    def values(self) -> dict[str, Any]:
        """Return what is swept over as values: numbers, truth, text.

        Raises
        ------
        FedsplitError
            If one is not written as it must be.
        """
        return {key: _value(key, text) for key, text in self.swept.items()}


def members(overrides: Sequence[str], multirun: bool) -> list[Member]:
    """Return the product of all that is swept over, in Hydra's order: the last changes fastest.

    ``study=NAME`` stands for the overrides in conf/study/NAME.yaml, or in a file of that name;
    those typed beside it take the place of those of the same key.

    Raises
    ------
    FedsplitError
        If an override cannot be parsed, sweeps over nothing, or sweeps without `multirun`.
    """
    # What is typed later takes the place of what was said before of the same key.
    texts = list({split(text)[0]: text for text in _with_study(overrides, multirun)}.values())
    choices = expand_sweeps(texts, multirun)
    for text, values in zip(texts, choices, strict=True):
        key, _, value = text.partition("=")
        require(len(values) > 0, key, value, "something that there is")
    found = []
    for chosen in itertools.product(*choices):
        swept = [text for text, values in zip(chosen, choices, strict=True) if len(values) > 1]
        name = " ".join(map(_short_name, swept or chosen)) or "default"
        pairs = dict(text.split("=", 1) for text in swept)
        found.append(Member(name=name, overrides=tuple(chosen), swept=pairs))
    return found


def _with_study(overrides: Sequence[str], multirun: bool) -> list[str]:
    named = [text for text in overrides if text.startswith(f"{STUDY}=")]
    if not named:
        return list(overrides)
    value = named[-1].partition("=")[2]
    require(multirun, STUDY, value, "with --multirun (-m)")
    return [*_read_study(value), *(text for text in overrides if text not in named)]


def _read_study(name: str) -> list[str]:
    folder = config_dir() / STUDY
    known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    shipped = folder / f"{name}.yaml"
    file = shipped if shipped.is_file() else Path(name).expanduser()
    require(file.is_file(), STUDY, name, f"one of {known}, or a YAML file with `overrides:`")
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise FedsplitError(f"study={name!r}: cannot be read ({error})") from error
    written = read.get("overrides") if isinstance(read, dict) else None
    listed = isinstance(written, list) and all(isinstance(item, str) for item in written)
    if not listed:
        raise SettingsError(STUDY, name, "a YAML file with a list of texts under `overrides:`")
    return list(written or ())


def _value(key: str, text: str) -> Any:
    value = parse([f"{key}={text}"])[-1].value
    return value if isinstance(value, int | float | str | bool) else text


def _short_name(override: str) -> str:
    """Return ``bandwidth_hz=5e+06`` for ``channel.bandwidth_hz=5000000.0``."""
    key, _, value = override.partition("=")
    with suppress(ValueError):
        if float(short := f"{float(value):g}") == float(value):
            value = short
    return f"{key.rpartition('.')[2]}={value}"
