"""docs/reproduce.md says what ``fedsplit reproduce all --seeds 5`` wrote, kept beside as JSON."""

import json
from typing import Any

from fedsplit.apps.reproduce.study import spread_text

from .pages import ROOT

PAGE = (ROOT / "docs" / "reproduce.md").read_text()
FOUND = json.loads((ROOT / "docs" / "results" / "reproduce.json").read_text())
ROWS = [{"paper": paper, **row} for paper, one in FOUND.items() for row in one["rows"]]
MET = {None: "-", True: "yes", False: "**missed**"}


def table(head: str) -> list[list[str]]:
    lines = PAGE.partition(f"| {head} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def spread(row: dict[str, Any], name: str, mean: str) -> str:
    """Return ``1 % (0 to 2)``."""
    number, opening, rest = spread_text(
        row[mean], row[f"{name}_min"], row[f"{name}_max"]
    ).partition(" (")
    return f"{number} {row['unit']}{opening}{rest}"


def test_every_claim_is_what_came_out() -> None:
    expected = [
        [
            row["paper"],
            row["what"],
            row["claim"],
            row["paper_baseline"],
            spread(row, "ours", "ours_mean"),
            row["strongest_baseline"],
            spread(row, "against_strongest", "against_strongest"),
            MET[row["met"]],
        ]
        for row in ROWS
    ]
    assert table(
        "paper | what | claim | against | ours | strongest baseline | against it | met"
    ) == (expected)
    assert {one["seeds"] == [0, 1, 2, 3, 4] for one in FOUND.values()} == {True}


def test_what_a_gain_comes_from_is_said_as_the_command_says_it() -> None:
    known = {
        (
            row["paper"],
            row["gain"],
            row["tuned"],
            "" if row["ours_better"] is None else f"{row['ours_better']:.1f} %: {row['better']}",
        )
        for row in ROWS
    }
    listed = table("paper | what | the gain comes from | tuned | with fedsplit's own options")
    assert len(listed) > 20
    for paper, what, gain, tuned, better in listed:
        assert (paper, gain, tuned, better) in known, what
        assert what.partition(", against ")[0] in {row["what"] for row in ROWS}, what


def test_remarks_and_misses_are_those_of_the_command() -> None:
    for paper, one in FOUND.items():
        assert f"- {paper}: {' '.join(one['notes'])}\n" in PAGE
    missed = [name for one in FOUND.values() for name in one["missed"]]
    assert missed == ["training delay, mean over models, against best static cut"]
