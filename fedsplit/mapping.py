"""Dataclasses to and from plain mappings: how settings travel from YAML files and between nodes."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import dacite

from fedsplit.errors import FedsplitError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)
else:
    T = TypeVar("T")

_STRICT = dacite.Config(strict=True, cast=[tuple, float, enum.Enum])


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from `values`, nested dataclasses included.

    Parameters
    ----------
    cls : type
        The dataclass to build.
    values : Mapping
        Field values; lists stand for tuples and integers for floats.
    where : str
        What the values describe ("data", "train.optimizer"), for the error.

    Raises
    ------
    FedsplitError
        If a field is unknown, missing or of the wrong type; names the field and the known ones.
    """
    try:
        return dacite.from_dict(cls, dict(values), _STRICT)
    except FedsplitError:
        raise
    except (dacite.DaciteError, ValueError, TypeError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(cls))
        raise FedsplitError(f"{where}: {error}; known fields: {known}") from error


def to_mapping(value: "DataclassInstance") -> dict[str, Any]:
    """Return `value` as nested plain mappings that `from_mapping` reads back."""
    return dataclasses.asdict(value)
