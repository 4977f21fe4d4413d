"""The figures of docs/privacy.md are those that were measured."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from .pages import ROOT

PAGE = (ROOT / "docs" / "privacy.md").read_text()
MEASURED = json.loads((ROOT / "docs" / "privacy.json").read_text())


def row(found: Mapping[str, Any]) -> str:
    """Return what the page says of one line of ``python -m benchmarks.audit``."""
    shares = [
        f"{found[f'{attack} {domain}']:.2f}"
        for domain in ("same", "other")
        for attack in ("ridge", "inverter")
    ]
    cells = [str(found["cut"]), str(found["codec"]), f"{found['noise']:g}", *shares]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("model", MEASURED)
def test_the_table_is_what_the_benchmark_measured(model: str) -> None:
    assert MEASURED[model]["missed"] == []
    for found in MEASURED[model]["leakage"]:
        assert row(found) in PAGE
        assert f"guessing {found['guessing']:.2f}" in PAGE


def test_the_frontier_is_what_the_benchmark_measured() -> None:
    for point in MEASURED["shipped"]["frontier"]:
        assert f"| {point['noise']:g} | {point['loss']:.3f} | {point['read']:.2f} |" in PAGE
