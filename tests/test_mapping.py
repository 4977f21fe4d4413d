"""Settings survive the trip through plain mappings, and mistakes in them are named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from fedsplit.errors import FedsplitError, SettingsError, require
from fedsplit.mapping import call, from_mapping, to_mapping


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        require(self.rate > 0, "rate", self.rate, "above 0")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str
    count: int = 1
    often: bool = False
    words: tuple[str, ...] | str | None = None
    parts: tuple[Inner, ...] = ()
    extra: dict[str, object] = field(default_factory=dict)


def test_a_dataclass_survives_json() -> None:
    value = Outer(Inner(rate=2.0, betas=(0.5, 0.6)), "x", parts=(Inner(),), extra={"a": [1, "b"]})
    assert from_mapping(Outer, json.loads(json.dumps(to_mapping(value))), "outer") == value


@dataclass
class WholeFirst:
    value: int | float | str


@dataclass
class TextFirst:
    value: str | float | int


def test_a_value_is_of_the_first_type_that_it_fits_in_the_order_of_its_own_class() -> None:
    assert WholeFirst.__annotations__ == TextFirst.__annotations__, "types forget the order"
    for _ in range(2):
        for cls, found in ((WholeFirst, int), (TextFirst, float)):
            assert type(from_mapping(cls, {"value": 1}, "one").value) is found
        with pytest.raises(SettingsError, match="a whole number or a number or text"):
            from_mapping(WholeFirst, {"value": []}, "one")
        with pytest.raises(SettingsError, match="text or a number or a whole number"):
            from_mapping(TextFirst, {"value": []}, "one")


def test_an_integer_stands_for_a_float() -> None:
    rate = from_mapping(Inner, {"rate": 1}, "inner").rate
    assert (rate, type(rate)) == (1.0, float)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"nmae": 1}, "outer.nmae=1: must be a known setting; the nearest is outer.name"),
        ({"zzz": 1}, "outer.zzz=1: must be a known setting of outer: inner, name, count, "),
        ({"name": 3}, "outer.name=3: must be text"),
        ({"inner": {"rate": "fast"}}, "outer.inner.rate='fast': must be a number"),
        ({"inner": {"rate": True}}, "outer.inner.rate=True: must be a number"),
        ({"inner": {"rate": -1}}, "outer.inner.rate=-1.0: must be above 0"),
        ({"inner": {"rte": 1}}, "outer.inner.rte=1: must be a known setting; .* outer.inner.rate"),
        ({"inner": 1}, "outer.inner=1: must be a mapping of rate, betas"),
        ({"inner": {"betas": [0.1]}}, r"outer.inner.betas=\[0.1\]: must be a list of 2"),
        ({"inner": {"betas": [0.1, "a"]}}, r"outer.inner.betas\[1\]='a': must be a number"),
        ({"count": 2.0}, "outer.count=2.0: must be a whole number"),
        ({"count": True}, "outer.count=True: must be a whole number"),
        ({"often": 1}, "outer.often=1: must be true or false"),
        ({"words": 3}, "outer.words=3: must be a list or text or null"),
        ({"parts": "ab"}, "outer.parts='ab': must be a list"),
        ({"parts": [{"rate": 0}]}, r"outer.parts\[0\].rate=0.0: must be above 0"),
        ({"extra": []}, r"outer.extra=\[\]: must be a mapping"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_is_allowed(
    values: dict[str, object], complaint: str
) -> None:
    with pytest.raises(FedsplitError, match=f"^{complaint}"):
        from_mapping(Outer, {"inner": {}, "name": "x", **values}, "outer")


def test_what_is_missing_is_named() -> None:
    with pytest.raises(FedsplitError, match="outer.name=None: must be given"):
        from_mapping(Outer, {"inner": {}}, "outer")


class Maker:
    """Something with settings that is no dataclass."""

    def __init__(self, cut: int | str | Mapping[str, object], tail: int | None = None) -> None:
        require(tail != 0, "strategy.tail", tail, "null or at least 1")
        self.cut, self.tail = cut, tail


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, "strategy.cut=None: must be given"),
        ({"cut": 2.5}, "strategy.cut=2.5: must be a whole number or text or a mapping"),
        ({"cut": 1, "tial": 1}, "strategy.tial=1: must be a known setting; .* strategy.tail"),
        ({"cut": 1, "tail": "x"}, "strategy.tail='x': must be a whole number or null"),
        ({"cut": 1, "tail": 0}, "strategy.tail=0: must be null or at least 1"),
    ],
)
def test_a_call_is_checked_against_the_signature(values: dict[str, object], complaint: str) -> None:
    assert call(Maker, {"cut": {"name": "fast"}}, "strategy").tail is None
    with pytest.raises(FedsplitError, match=f"^{complaint}"):
        call(Maker, values, "strategy")
