"""Settings survive the trip through plain mappings, and mistakes in them are named."""

import json
from dataclasses import dataclass, field

import pytest

from fedsplit.errors import FedsplitError
from fedsplit.mapping import from_mapping, to_mapping


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str
    extra: dict[str, object] = field(default_factory=dict)


def test_a_dataclass_survives_json() -> None:
    value = Outer(Inner(rate=2.0, betas=(0.5, 0.6)), "x", {"a": [1, "b"]})
    assert from_mapping(Outer, json.loads(json.dumps(to_mapping(value))), "outer") == value


def test_an_integer_stands_for_a_float() -> None:
    assert from_mapping(Inner, {"rate": 1}, "inner").rate == 1.0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"inner": {}, "name": "x", "nmae": 1}, "nmae"),
        ({"inner": {}}, "name"),
        ({"inner": {}, "name": 3}, "name"),
        ({"inner": {"rate": "fast"}, "name": "x"}, "fast"),
        ({"inner": {"rte": 1}, "name": "x"}, "rte"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_known_fields(
    values: dict[str, object], named: str
) -> None:
    with pytest.raises(FedsplitError, match=rf"outer: .*{named}.*known fields: inner, name, extra"):
        from_mapping(Outer, values, "outer")
