"""The figures of docs/privacy.md are those that were measured."""

import json

import pytest

from benchmarks.audit import row
from benchmarks.defences import row as defence_row

from .pages import ROOT

PAGE = (ROOT / "docs" / "privacy.md").read_text()
MEASURED = json.loads((ROOT / "docs" / "privacy.json").read_text())


@pytest.mark.parametrize("model", MEASURED)
def test_the_table_is_what_the_benchmark_measured(model: str) -> None:
    """Each entry of docs/privacy.json is the last line of ``python -m benchmarks.audit``."""
    assert [missed for missed in MEASURED[model]["missed"] if missed not in PAGE] == []
    for found in MEASURED[model]["leakage"]:
        assert row(found) in PAGE
        assert f"guessing {found['guessing']:.2f}" in PAGE


@pytest.mark.parametrize("model", [name for name in MEASURED if "frontier" in MEASURED[name]])
def test_the_frontier_is_what_the_benchmark_measured(model: str) -> None:
    for point in MEASURED[model]["frontier"]:
        assert f"| {point['noise']:g} | {point['loss']:.3f} | {point['read']:.2f} |" in PAGE


def test_the_defences_are_what_their_benchmark_measured() -> None:
    """Each is a line that ``python -m benchmarks.defences`` printed."""
    for found in MEASURED.values():
        for point in found.get("defences", ()):
            assert defence_row(point) in PAGE
