"""docs/results.md compares the schemes by what the three protocols found, kept beside as JSON."""

import json
from math import isnan

from .pages import ROOT

FOUND = json.loads((ROOT / "docs" / "results" / "schemes.json").read_text())
PAGE = (ROOT / "docs" / "results.md").read_text()


def figure(mean: float, half: float) -> str:
    return f"{mean:.3f}" if isnan(half) else f"{mean:.3f} ± {half:.3f}"


def test_the_table_is_what_the_protocols_found() -> None:
    text = PAGE.partition("| scheme | seeds |")[2].partition("\n\n")[0]
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    expected = []
    for kept, spent, lost in zip(
        FOUND["budget"], FOUND["target"], FOUND["robustness"], strict=True
    ):
        assert kept["group"] == spent["group"] == lost["group"].split(",")[0]
        expected.append(
            [
                kept["group"],
                str(kept["runs"]),
                figure(kept["eval_loss"], kept["eval_loss.half_width"]),
                f"{spent['delay_s']:.2f} ({spent['reached']} of {spent['runs']})",
                f"{spent['traffic_bytes'] / 1e6:.1f}",
                figure(lost["loss"], lost["loss.half_width"]),
            ]
        )
    assert shown == expected
