"""What ``fedsplit reproduce`` prints and leaves behind."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fedsplit.figures import COLUMN_IN, HATCHES, figure, legend, styles

from .common import Chart, Findings, Row, Spread


def figures_table(found: Sequence[Findings]) -> Table:
    """Return one row per comparison; changes against the baseline, mean and range over seeds."""
    table = Table(title="Claims and what fedsplit finds: mean (range) over seeds", show_lines=True)
    for heading in ("paper", "what", "claim", "against"):
        table.add_column(heading, overflow="fold")
    table.add_column("ours", justify="right")
    table.add_column("strongest baseline", overflow="fold")
    table.add_column("against it", justify="right")
    table.add_column("met", no_wrap=True)
    for one in found:
        for row in one.rows:
            words = row.words
            table.add_row(
                one.paper,
                words.name,
                words.claim,
                words.versus,
                _figure(row.ours, words.unit),
                words.strongest,
                _figure(row.against_strongest, words.unit),
                row.verdict,
            )
    return table


def gains_table(found: Sequence[Findings]) -> Table:
    """Return what each row's gain comes from, what was tuned, and what fedsplit can add."""
    table = Table(title="What it comes from", show_lines=True)
    for heading in ("paper", "what", "against", "the gain comes from", "tuned"):
        table.add_column(heading, overflow="fold")
    table.add_column("with fedsplit's own options", overflow="fold")
    for one in found:
        for row in one.rows:
            words, better = row.words, row.ours_better
            own = "" if better is None else f"{_figure(better, words.unit)}: {words.better}"
            table.add_row(one.paper, words.name, words.versus, words.gain, words.tuned, own)
    return table


def provenance_table(found: Sequence[Findings]) -> Table:
    """Return where each paper's settings come from, and what to know of its figures."""
    table = Table(title="Where the settings come from", show_lines=True)
    table.add_column("paper")
    table.add_column("settings", overflow="fold", ratio=1)
    table.add_column("to be known", overflow="fold", ratio=1)
    for one in found:
        table.add_row(one.paper, one.provenance.strip(), " ".join(one.notes))
    return table


def record(one: Findings) -> dict[str, Any]:
    """Return a paper's findings as JSON values: `rows`, and what holds for all of them."""
    return {
        "seeds": list(one.seeds),
        "rows": [_row(row, one.provenance.strip()) for row in one.rows],
        "missed": [_label(row) for row in one.rows if not row.passed],
        "notes": list(one.notes),
    }


def _row(row: Row, provenance: str) -> dict[str, Any]:
    words, better = row.words, row.ours_better
    return {
        "what": words.name,
        "claim": words.claim,
        "unit": words.unit,
        "paper_baseline": words.versus,
        "ours_mean": row.ours.mean,
        "ours_min": row.ours.low,
        "ours_max": row.ours.high,
        "strongest_baseline": words.strongest,
        "against_strongest": row.against_strongest.mean,
        "against_strongest_min": row.against_strongest.low,
        "against_strongest_max": row.against_strongest.high,
        "gain": words.gain,
        "tuned": words.tuned,
        "accepted": None if words.accepted is None else list(words.accepted),
        "met": None if words.accepted is None else row.passed,
        "ours_better": None if better is None else better.mean,
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
        for number, chart in enumerate(one.charts, 1):
            draw(chart, folder / f"{one.paper}{'' if number == 1 else f'_{number}'}.png")


def draw(chart: Chart, path: Path) -> None:
    """Draw a chart to a PNG: bars stacked by series where x holds names, else lines."""
    places = range(len(chart.x))
    looks = styles(max(1, len(chart.series)))
    with figure(path, width_in=COLUMN_IN * 1.5, height_in=3.0) as (_, axes):
        if isinstance(chart.x[0], str):
            width = 0.8 / (1 if chart.stacked else len(chart.series))
            bottom = [0.0] * len(chart.x)
            for number, (name, values) in enumerate(chart.series.items()):
                shift = 0.0 if chart.stacked else (number - (len(chart.series) - 1) / 2) * width
                at = [place + shift for place in places]
                look = {"color": looks[number]["color"], "hatch": HATCHES[number % len(HATCHES)]}
                axes.bar(
                    at, values, width, bottom=bottom, label=name or None, edgecolor="white", **look
                )
                if chart.stacked:
                    bottom = [a + b for a, b in zip(bottom, values, strict=True)]
            axes.set_xticks(places, [str(name) for name in chart.x], rotation=20, ha="right")
            axes.grid(visible=False, axis="x")
        else:
            for (name, values), look in zip(chart.series.items(), looks, strict=True):
                axes.plot(chart.x, values, label=name or None, **look)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axes.set_title(chart.title, pad=18 if any(chart.series) else None)
        if any(chart.series):
            legend(axes)


def _figure(spread: Spread, unit: str) -> str:
    return f"{spread} {unit}"


def _label(row: Row) -> str:
    return f"{row.words.name}, against {row.words.versus}"
