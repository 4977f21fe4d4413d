"""Dataclasses to and from plain mappings: how settings travel from YAML files and between nodes."""

import dataclasses
import enum
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from fedsplit.errors import FedsplitError, SettingsError, require, require_choice, require_known

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)
else:
    T = TypeVar("T")
Made = TypeVar("Made")
_Converter: TypeAlias = Callable[[Any, str], Any]

_WORDS: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
}


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from `values`, nested dataclasses included.

    Nothing is guessed: text is no number, ``true`` is not 1, 2.0 is no whole number.

    Parameters
    ----------
    cls : type
        The dataclass to build.
    values : Mapping
        Field values; lists stand for tuples and whole numbers for floats.
    where : str
        What the values describe ("data", "train.optimizer"), for the error.

    Raises
    ------
    FedsplitError
        If a field is unknown, missing, of the wrong type or refused by `cls`; names it as
        ``where.field``, and what is allowed.
    """
    optional, converters = _optional(cls), _converters(cls)
    given: dict[str, Any] = {}
    for name, value in values.items():
        require_known(f"{where}.{name}", value, optional)
        given[name] = converters[name](value, f"{where}.{name}")
    for name, may_be_absent in optional.items():
        require(may_be_absent or name in given, f"{where}.{name}", None, "given")
    return _made(cls, given, where, optional)


@cache
def _optional(cls: type[Any]) -> Mapping[str, bool]:
    """Return the fields of a dataclass that are given, and whether each may be left out."""
    return {
        field.name: (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        for field in dataclasses.fields(cls)
        if field.init
    }


@cache
def _converters(cls: Any) -> Mapping[str, _Converter]:
    """Return what converts to each field's type: a type is looked at once for a class.

    Not once for all classes, because ``int | float`` equals ``float | int``.
    """
    return {name: _converter(kind) for name, kind in hints_of(cls).items()}


def call(factory: Callable[..., Made], values: Mapping[str, Any], where: str) -> Made:
    """Call `factory` with `values` as its keyword arguments, checked against its signature.

    Parameters
    ----------
    factory : callable
        A class or function whose parameters are annotated, or not.
    values : Mapping
        Its arguments as plain values, or as the objects that they are to be.
    where : str
        What the values describe, for the error.

    Raises
    ------
    FedsplitError
        If an argument is unknown, missing, of the wrong type or refused; names it as
        ``where.argument``, and what is allowed.
    """
    parameters = parameters_of(factory)
    described: Any = factory
    hints = hints_of(described.__init__ if isinstance(factory, type) else described)
    known = [name for name, parameter in parameters.items() if parameter.kind not in _COLLECTING]
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    given: dict[str, Any] = {}
    for name, value in values.items():
        if not takes_all:
            require_known(f"{where}.{name}", value, known)
        given[name] = convert(hints.get(name, Any), value, f"{where}.{name}")
    for name in known:
        optional = parameters[name].default is not inspect.Parameter.empty
        require(optional or name in given, f"{where}.{name}", None, "given")
    return _made(factory, given, where, known)


_COLLECTING = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def convert(kind: Any, value: Any, field: str) -> Any:
    """Return `value` as the type `kind` has it.

    Raises
    ------
    FedsplitError
        If it is of another type; names `field`.
    """
    return _converter(kind)(value, field)


def _converter(kind: Any) -> _Converter:
    """Return what converts to `kind`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return partial(_one_of, parts, [_converter(part) for part in parts])
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return partial(_instance, kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return partial(_member, kind)
    if origin is tuple:
        return partial(_tuple, [_converter(part) for part in parts], parts[1:] == (Ellipsis,))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return partial(_mapping, _converter(parts[1]))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return partial(_list, _converter(parts[0]))
    wanted = origin or kind
    if isinstance(wanted, type) and wanted not in (object, Any):
        return partial(_plain, wanted)
    return lambda value, field: value


def _instance(kind: type[Any], value: Any, field: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        names = ", ".join(item.name for item in dataclasses.fields(kind))
        raise SettingsError(field, value, f"a mapping of {names}")
    return from_mapping(kind, value, field)


def _member(kind: type[enum.Enum], value: Any, field: str) -> enum.Enum:
    require_choice(field, value, [member.value for member in kind])
    return kind(value)


def _mapping(to_item: _Converter, value: Any, field: str) -> dict[Any, Any]:
    require(isinstance(value, Mapping), field, value, "a mapping")
    return {key: to_item(item, f"{field}.{key}") for key, item in value.items()}


def _list(to_item: _Converter, value: Any, field: str) -> list[Any]:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    require(listed, field, value, "a list")
    return [to_item(item, f"{field}[{at}]") for at, item in enumerate(value)]


def _plain(kind: type[Any], value: Any, field: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    right = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    require(right, field, value, _words(kind))
    return value


def _one_of(kinds: Sequence[Any], converters: Sequence[_Converter], value: Any, field: str) -> Any:
    """Return `value` as the first of `kinds` that it fits."""
    if value is None and NoneType in kinds:
        return None
    others = [to for kind, to in zip(kinds, converters, strict=True) if kind is not NoneType]
    for to_kind in others:
        try:
            return to_kind(value, field)
        except SettingsError as error:
            if len(others) == 1 and error.field != field:
                raise
    raise SettingsError(field, value, " or ".join(map(_words, kinds)))


def _tuple(
    converters: Sequence[_Converter], any_length: bool, value: Any, field: str
) -> tuple[Any, ...]:
    require(isinstance(value, list | tuple), field, value, "a list")
    if any_length:
        converters = [converters[0]] * len(value)
    require(len(value) == len(converters), field, value, f"a list of {len(converters)}")
    pairs = enumerate(zip(converters, value, strict=True))
    return tuple(to_item(item, f"{field}[{at}]") for at, (to_item, item) in pairs)


def _words(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin in _WORDS:
        return _WORDS[origin]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return "a list"
    return f"a {getattr(origin, '__name__', origin)}"


@cache
def hints_of(described: Any) -> Mapping[str, Any]:
    """Return the types that a class or function is annotated with, looked up once."""
    return get_type_hints(described)


def parameters_of(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a class or function, looked up once."""
    return _parameters(factory)


@cache
def _parameters(factory: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(factory).parameters


def _made(
    factory: Callable[..., Made], given: Mapping[str, Any], where: str, names: Iterable[str]
) -> Made:
    """Call `factory`; a field that it refuses is named as the user knows it."""
    try:
        return factory(**given)
    except SettingsError as error:
        field = _full(error.field, where, names)
        raise SettingsError(field, error.value, error.allowed) from error
    except FedsplitError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise FedsplitError(f"{where}: {error}") from error


def _full(field: str, where: str, names: Iterable[str]) -> str:
    """Return ``train.optimizer.lr`` for ``lr`` or ``optimizer.lr`` of ``train.optimizer``."""
    head = field.partition(".")[0]
    if field.startswith(f"{where}."):
        return field
    if head == where.rpartition(".")[2]:
        return where + field.removeprefix(head)
    return f"{where}.{field}" if head in names else field


def to_mapping(value: "DataclassInstance") -> dict[str, Any]:
    """Return `value` as nested plain mappings that `from_mapping` reads back; leaves are shared."""
    return {field.name: _unmade(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _unmade(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, Mapping):
        return {key: _unmade(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_unmade(item) for item in value]
    return value
