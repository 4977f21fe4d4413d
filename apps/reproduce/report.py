"""What ``fedsplit reproduce`` prints and leaves behind."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from fedsplit.arrays import Array
from fedsplit.figures import COLUMN_IN
from fedsplit.report.studies.charts import write

from .study import Findings, Row, extent, spread_text

_CLAIMS = "paper,what,claim,against,ours,strongest baseline,against it,met"
_GAINS = "paper,what,against,the gain comes from,tuned,with fedsplit's own options"
_AGAINST = "against_strongest", "against_strongest_min", "against_strongest_max"
_MET = {None: "-", True: "yes", False: "MISSED"}


def tables(found: Sequence[Findings]) -> tuple[Table, Table, Table]:
    """Return claims and what comes out, what that comes from, and where settings come from."""
    rows = [_texts(one.paper, row) for one in found for row in one.rows]
    settings = [
        {"paper": one.paper, "settings": one.provenance, "to be known": " ".join(one.notes)}
        for one in found
    ]
    return (
        _table("Claims and what fedsplit finds: mean (range) over seeds", _CLAIMS, rows),
        _table("What it comes from", _GAINS, rows),
        _table("Where the settings come from", ",".join(settings[0]), settings),
    )


def _texts(paper: str, row: Row) -> dict[str, str]:
    words, better = row.words, row.ours_better

    def shown(values: Array) -> str:
        return f"{spread_text(*extent(values))} {words.unit}"

    return {
        "paper": paper,
        "what": words.what,
        "claim": words.claim,
        "against": words.paper_baseline,
        "ours": shown(row.ours),
        "strongest baseline": words.strongest_baseline,
        "against it": shown(row.against_strongest),
        "met": _MET[row.passed],
        "the gain comes from": words.gain,
        "tuned": words.tuned,
        "with fedsplit's own options": "" if better is None else f"{shown(better)}: {words.better}",
    }


def _table(title: str, columns: str, rows: Sequence[dict[str, str]]) -> Table:
    headings = columns.split(",")
    table = Table(*headings, title=title, show_lines=True)
    for row in rows:
        table.add_row(*(row[heading] for heading in headings))
    return table


def record(one: Findings) -> dict[str, Any]:
    """Return a paper's findings as JSON values: `rows`, and what holds for all of them."""
    missed = (row.words for row in one.rows if row.passed is False)
    return {
        "seeds": list(one.seeds),
        "rows": [_row(row) | {"provenance": one.provenance} for row in one.rows],
        "missed": [f"{words.what}, against {words.paper_baseline}" for words in missed],
        "notes": list(one.notes),
    }


def _row(row: Row) -> dict[str, Any]:
    words, ours, strongest = row.words, extent(row.ours), extent(row.against_strongest)
    return {
        **{name: getattr(words, name) for name in ("what", "claim", "unit", "paper_baseline")},
        **dict(zip(("ours_mean", "ours_min", "ours_max"), ours, strict=True)),
        "strongest_baseline": words.strongest_baseline,
        **dict(zip(_AGAINST, strongest, strict=True)),
        **{name: getattr(words, name) for name in ("gain", "tuned", "accepted")},
        "met": row.passed,
        "ours_better": None if row.ours_better is None else extent(row.ours_better)[0],
        "better": words.better,
    }


def write_files(found: Sequence[Findings], folder: Path) -> None:
    """Write ``reproduce.json``, ``reproduce.csv``, and every paper's plots and their data."""
    folder.mkdir(parents=True, exist_ok=True)
    records = {one.paper: record(one) for one in found}
    (folder / "reproduce.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    rows = [{"paper": paper, **row} for paper, one in records.items() for row in one["rows"]]
    pd.DataFrame(rows).to_csv(folder / "reproduce.csv", index=False)
    for one in found:
        for number, plot in enumerate(one.study.plots, 1):
            stem = folder / f"{one.paper}{'' if number == 1 else f'_{number}'}"
            write(one.case.chart(plot), stem, width_in=COLUMN_IN * 1.5)
