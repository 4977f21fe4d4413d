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

MEMBER = "member"
"""Stands, among what is swept over, for the name that a study's file gives to a member."""
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
    those typed beside it take the place of those of the same key. If the file names members, each
    has its own overrides besides, which nothing takes the place of.

    Raises
    ------
    FedsplitError
        If an override cannot be parsed, sweeps over nothing, or sweeps without `multirun`.
    """
    named = [text for text in overrides if text.startswith(f"{STUDY}=")]
    if not named:
        return _product("", overrides, multirun)
    value = named[-1].partition("=")[2]
    require(multirun, STUDY, value, "with --multirun (-m)")
    typed = [text for text in overrides if text not in named]
    file = read_study(value)
    return named_members([*file["overrides"], *typed], file["members"])


def named_members(overrides: Sequence[str], members: Mapping[str, Sequence[str]]) -> list[Member]:
    """Return the members of a study's file, by name; what `overrides` sweep over multiplies each.

    Raises
    ------
    FedsplitError
        As `members`.
    """
    each = members or {"": ()}
    return [one for name in each for one in _product(name, [*overrides, *each[name]], True)]


def _product(member: str, overrides: Sequence[str], multirun: bool) -> list[Member]:
    # What is said later takes the place of what was said before of the same key.
    texts = list({split(text)[0]: text for text in overrides}.values())
    choices = expand_sweeps(texts, multirun)
    for text, values in zip(texts, choices, strict=True):
        key, _, value = text.partition("=")
        require(len(values) > 0, key, value, "something that there is")
    found = []
    for chosen in itertools.product(*choices):
        swept = [text for text, values in zip(chosen, choices, strict=True) if len(values) > 1]
        words = [member, *map(_short_name, swept)] if member else map(_short_name, swept or chosen)
        pairs = dict(text.split("=", 1) for text in swept)
        held = {MEMBER: member} | pairs if member else pairs
        name = " ".join(words) or "default"
        found.append(Member(name=name, overrides=tuple(chosen), swept=held))
    return found


def read_study(name: str) -> dict[str, Any]:
    """Return what the file of a study says: ``overrides``, ``members`` by name, and all else.

    Raises
    ------
    FedsplitError
        If there is no such file, or these two are not as they must be.
    """
    folder = config_dir() / STUDY
    known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    shipped = folder / f"{name}.yaml"
    file = shipped if shipped.is_file() else Path(name).expanduser()
    require(file.is_file(), STUDY, name, f"one of {known}, or a YAML file with `overrides:`")
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise FedsplitError(f"study={name!r}: cannot be read ({error})") from error
    kept = {"overrides": [], "members": {}, **(read if isinstance(read, dict) else {})}
    own = kept["members"]
    listed = isinstance(own, dict) and all(map(_are_texts, (kept["overrides"], *own.values())))
    if not listed or not (kept["overrides"] or own):
        allowed = "a YAML file with a list of texts under `overrides:`, or several by name under"
        raise SettingsError(STUDY, name, f"{allowed} `members:`")
    return kept


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _value(key: str, text: str) -> Any:
    if key == MEMBER:
        return text
    value = parse([f"{key}={text}"])[-1].value
    return value if isinstance(value, int | float | str | bool) else text


def _short_name(override: str) -> str:
    """Return ``bandwidth_hz=5e+06`` for ``channel.bandwidth_hz=5000000.0``."""
    key, _, value = override.partition("=")
    with suppress(ValueError):
        if float(short := f"{float(value):g}") == float(value):
            value = short
    return f"{key.rpartition('.')[2]}={value}"
