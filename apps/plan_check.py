"""``fedsplit plan --check RUN``: how far the model was from what a run measured."""

from collections.abc import Iterable
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedsplit.errors import require
from fedsplit.report import TurnRow, read_records, read_turns

from .records import phases


def check_run(folder: Path, console: Console) -> int:
    """Print seconds measured and modelled of a run's training turns, by phase and by device.

    Raises
    ------
    FedsplitError
        If `folder` is not that of a run, or nothing of it was modelled.
    """
    read_records(folder)
    rows = [row for row in read_turns(folder) if row.modelled_compute_s is not None]
    found = phases(rows)
    require(found is not None, "--check", str(folder), "a run that trained a turn at least")
    assert found is not None
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("phase", "measured s", "modelled s", "off by", "median of turns"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    turns = {
        "compute": _errors((row.compute_s, row.modelled_compute_s) for row in rows),
        "link": _errors((row.link_s, row.modelled_link_s) for row in rows),
        "wait": [],
    }
    for phase, seconds in found.items():
        measured, modelled = seconds["measured_s"], seconds["modelled_s"]
        off = "not modelled" if phase == "wait" else _percent(_errors([(measured, modelled)]))
        table.add_row(phase, f"{measured:.4g}", f"{modelled:.4g}", off, _percent(turns[phase]))
    console.print(table)
    worst = _by_device(rows)
    if worst is not None:
        device, error = worst
        console.print(f"computing of device {device} is furthest off: {error:+.1%}")
    return 0


def _errors(pairs: Iterable[tuple[float, float | None]]) -> list[float]:
    """Return how far the model is off, relative to what was measured."""
    return [(model or 0.0) / real - 1 for real, model in pairs if real > 0]


def _percent(errors: list[float]) -> str:
    return f"{median(errors):+.1%}" if errors else "-"


def _by_device(rows: list[TurnRow]) -> tuple[int, float] | None:
    """Return the device whose computing the model misses most, and by how much."""
    real: dict[int, float] = {}
    model: dict[int, float] = {}
    for row in rows:
        real[row.device] = real.get(row.device, 0.0) + row.compute_s
        model[row.device] = model.get(row.device, 0.0) + (row.modelled_compute_s or 0.0)
    errors = {device: model[device] / real[device] - 1 for device in real if real[device] > 0}
    return max(errors.items(), key=lambda item: abs(item[1]), default=None)
