"""What ``fedsplit reproduce`` prints and leaves behind."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .common import Chart, Figure, Reproduction


def figures_table(found: Sequence[Reproduction]) -> Table:
    """Return one row per comparison; changes against the baseline."""
    table = Table(title="Claims and what fedsplit finds", show_lines=True)
    for heading in ("paper", "what", "claim", "against"):
        table.add_column(heading, overflow="fold")
    table.add_column("ours", justify="right", no_wrap=True)
    table.add_column("ours, better", overflow="fold")
    table.add_column("met", no_wrap=True)
    for one in found:
        for figure in one.figures:
            better = "" if figure.ours_better is None else f"{figure.ours_better:.1f} {figure.unit}"
            table.add_row(
                one.paper,
                figure.name,
                figure.claim,
                figure.versus,
                f"{_number(figure.ours)} {figure.unit}",
                f"{better} {figure.better}".strip(),
                _verdict(figure),
            )
    return table


def provenance_table(found: Sequence[Reproduction]) -> Table:
    """Return where each paper's settings come from, and what to know of its figures."""
    table = Table(title="Where the settings come from", show_lines=True)
    table.add_column("paper")
    table.add_column("settings", overflow="fold", ratio=1)
    table.add_column("to be known", overflow="fold", ratio=1)
    for one in found:
        table.add_row(one.paper, one.provenance.strip(), " ".join(one.notes))
    return table


def record(one: Reproduction) -> dict[str, Any]:
    """Return a paper's figures as JSON values: four mappings by comparison."""
    labels = [f"{figure.name}, against {figure.versus}" for figure in one.figures]
    pairs = list(zip(labels, one.figures, strict=True))
    return {
        "claim": {label: figure.claim for label, figure in pairs},
        "ours": {label: figure.ours for label, figure in pairs},
        "ours_better": {
            label: figure.ours_better for label, figure in pairs if figure.ours_better is not None
        },
        "provenance": one.provenance.strip(),
        "missed": [label for label, figure in pairs if not figure.passed],
        "notes": list(one.notes),
    }


def write_files(found: Sequence[Reproduction], folder: Path) -> None:
    """Write ``reproduce.json``, ``reproduce.csv`` and the plots of every paper."""
    folder.mkdir(parents=True, exist_ok=True)
    records = {one.paper: record(one) for one in found}
    (folder / "reproduce.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    with (folder / "reproduce.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("paper", "what", "claim", "against", "ours", "ours_better", "unit", "better", "met")
        )
        for one in found:
            for figure in one.figures:
                writer.writerow(
                    (
                        one.paper,
                        figure.name,
                        figure.claim,
                        figure.versus,
                        figure.ours,
                        figure.ours_better,
                        figure.unit,
                        figure.better,
                        _verdict(figure),
                    )
                )
    for one in found:
        for number, chart in enumerate(one.charts, 1):
            draw(chart, folder / f"{one.paper}{'' if number == 1 else f'_{number}'}.png")


def draw(chart: Chart, path: Path) -> None:
    """Draw a chart to a PNG: bars stacked by series where x holds names, else lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    places = range(len(chart.x))
    if isinstance(chart.x[0], str):
        width = 0.8 / (1 if chart.stacked else len(chart.series))
        bottom = [0.0] * len(chart.x)
        for number, (name, values) in enumerate(chart.series.items()):
            shift = 0.0 if chart.stacked else (number - (len(chart.series) - 1) / 2) * width
            at = [place + shift for place in places]
            axes.bar(at, values, width, bottom=bottom, label=name or None)
            if chart.stacked:
                bottom = [a + b for a, b in zip(bottom, values, strict=True)]
        axes.set_xticks(
            places, [str(name) for name in chart.x], rotation=20, ha="right", fontsize=8
        )
    else:
        for name, values in chart.series.items():
            axes.plot(chart.x, values, "o-", label=name or None)
    if any(chart.series):
        axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="y")
    canvas.savefig(path, dpi=150)


def _number(value: float) -> str:
    """Return a percentage with one decimal, or as 1e-13 where that would be zero."""
    return f"{value:.0e}" if 0 < abs(value) < 0.01 else f"{value:.1f}"


def _verdict(figure: Figure) -> str:
    if figure.accepted is None:
        return "-"
    return "yes" if figure.passed else "MISSED"
