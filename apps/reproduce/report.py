"""What ``fedsplit reproduce`` prints and leaves behind."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from fedsplit.figures import COLUMN_IN, HATCHES, figure, legend, styles

from .study import Case, Chart, Findings, Row

_FOLD: Mapping[str, Any] = {"overflow": "fold"}
_CLAIMS = {
    **dict.fromkeys(("paper", "what", "claim", "against"), _FOLD),
    "ours": {"justify": "right"},
    "strongest baseline": _FOLD,
    "against it": {"justify": "right"},
    "met": {"no_wrap": True},
}
_GAINS = dict.fromkeys(
    ("paper", "what", "against", "the gain comes from", "tuned", "with fedsplit's own options"),
    _FOLD,
)
_WIDE = {**_FOLD, "ratio": 1}
_SETTINGS = {"paper": {}, "settings": _WIDE, "to be known": _WIDE}


def tables(found: Sequence[Findings]) -> tuple[Table, Table, Table]:
    """Return claims and what comes out, what that comes from, and where settings come from."""
    rows = [(one.paper, row, row.words) for one in found for row in one.rows]
    claims = (
        (
            paper,
            words.what,
            words.claim,
            words.paper_baseline,
            f"{row.ours} {words.unit}",
            words.strongest_baseline,
            f"{row.against_strongest} {words.unit}",
            {None: "-", True: "yes", False: "MISSED"}[row.passed],
        )
        for paper, row, words in rows
    )
    gains = (
        (paper, words.what, words.paper_baseline, words.gain, words.tuned, _own(row))
        for paper, row, words in rows
    )
    settings = ((one.paper, one.provenance, " ".join(one.notes)) for one in found)
    return (
        _table("Claims and what fedsplit finds: mean (range) over seeds", _CLAIMS, claims),
        _table("What it comes from", _GAINS, gains),
        _table("Where the settings come from", _SETTINGS, settings),
    )


def _own(row: Row) -> str:
    better = row.ours_better
    return "" if better is None else f"{better} {row.words.unit}: {row.words.better}"


def _table(title: str, columns: Mapping[str, Any], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, show_lines=True)
    for heading, options in columns.items():
        table.add_column(heading, **options)
    for row in rows:
        table.add_row(*row)
    return table


def record(one: Findings) -> dict[str, Any]:
    """Return a paper's findings as JSON values: `rows`, and what holds for all of them."""
    missed = (row.words for row in one.rows if row.passed is False)
    return {
        "seeds": list(one.seeds),
        "rows": [_row(row, one.provenance) for row in one.rows],
        "missed": [f"{words.what}, against {words.paper_baseline}" for words in missed],
        "notes": list(one.notes),
    }


def _row(row: Row, provenance: str) -> dict[str, Any]:
    words, better = row.words, row.ours_better
    ours, strongest = (
        dict(zip((f"{name}{end}" for end in ends), spread.range, strict=True))
        for name, ends, spread in (
            ("ours", ("_mean", "_min", "_max"), row.ours),
            ("against_strongest", ("", "_min", "_max"), row.against_strongest),
        )
    )
    return {
        **{name: getattr(words, name) for name in ("what", "claim", "unit", "paper_baseline")},
        **ours,
        "strongest_baseline": words.strongest_baseline,
        **strongest,
        "gain": words.gain,
        "tuned": words.tuned,
        "accepted": words.accepted and list(words.accepted),
        "met": row.passed,
        "ours_better": better and better.range[0],
        "better": words.better,
        "provenance": provenance,
    }


def write_files(found: Sequence[Findings], folder: Path) -> None:
    """Write ``reproduce.json``, ``reproduce.csv`` and the plots of every paper."""
    folder.mkdir(parents=True, exist_ok=True)
    records = {one.paper: record(one) for one in found}
    (folder / "reproduce.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    rows = [{"paper": paper, **row} for paper, one in records.items() for row in one["rows"]]
    with (folder / "reproduce.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    for one in found:
        for number, chart in enumerate(one.study.charts, 1):
            draw(one.case, chart, folder / f"{one.paper}{'' if number == 1 else f'_{number}'}.png")


def draw(case: Case, chart: Chart, path: Path) -> None:
    """Draw a chart to a PNG: bars where x holds names, else lines."""
    x, series = case.x[chart.x], case.series(chart)
    names, width = isinstance(x[0], str), 0.8 / (1 if chart.stacked else len(series))
    with figure(path, width_in=COLUMN_IN * 1.5, height_in=3.0) as (_, axes):
        below = np.zeros(len(x))
        shown = zip(series.items(), styles(len(series)), HATCHES, strict=False)
        for number, ((name, values), look, hatch) in enumerate(shown):
            if not names:
                axes.plot(x, values, label=name or None, **look)
                continue
            shift = 0.0 if chart.stacked else (number - (len(series) - 1) / 2) * width
            bars = {"color": look["color"], "hatch": hatch, "edgecolor": "white"}
            at = np.arange(len(x)) + shift
            axes.bar(at, values, width, bottom=below, label=name or None, **bars)
            below = below + values if chart.stacked else below
        if names:
            axes.set_xticks(range(len(x)), x, rotation=20, ha="right")
            axes.grid(visible=False, axis="x")
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axes.set_title(chart.title, pad=18 if any(series) else None)
        legend(axes)
