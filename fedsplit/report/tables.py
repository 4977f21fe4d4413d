"""What a run shows on the terminal: a line per round, a table at the end."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsplit.report.records import RoundRecord

_FIRST, _LAST = 3, 9
_LOG_WIDTH = 120
# Line breaks, and what joins an emoji of several characters.
_KEPT = "\n\u200d"
_MODELLED = {"delay_s": "delay s", "energy_j": "energy J"}


def make_console() -> Console:
    """Return a console as wide as the terminal, or as our tables where there is none (a log)."""
    return Console() if sys.stdout.isatty() else Console(width=_LOG_WIDTH)


def plain_text(value: object) -> str:
    """Return `value` as text that rich prints as it is.

    Line breaks stay; every other character that is not printable becomes its escape, such as
    ``\\x1b``.
    """
    shown = (c if c.isprintable() or c in _KEPT else ascii(c)[1:-1] for c in str(value))
    return escape("".join(shown))


def round_line(record: RoundRecord, n_rounds: int) -> str:
    """Return one line about a round, for a terminal or a log."""
    parts = [f"round {record.round}/{n_rounds}"]
    if record.train_loss is not None:
        parts.append(f"train {record.train_loss:.4f}")
    if record.eval_loss is not None:
        parts.append(f"eval {record.eval_loss:.4f}")
    if record.perplexity is not None:
        parts.append(f"perplexity {record.perplexity:.2f}")
    if record.accuracy is not None:
        parts.append(f"accuracy {record.accuracy:.1%}")
    if record.token_accuracy is not None:
        parts.append(f"tokens right {record.token_accuracy:.1%}")
    if record.central is not None:
        parts.append(f"central {record.central['loss']:.4f}")
    if record.macro_f1 is not None:
        parts.append(f"macro F1 {record.macro_f1:.3f}")
    if record.bytes_up or record.bytes_down:
        up, down = sum(record.bytes_up.values()), sum(record.bytes_down.values())
        parts.append(f"up {megabytes(up)} down {megabytes(down)}")
    if record.privacy is not None:
        spent = _number(record.privacy.get("epsilon"))
        unit, delta = record.privacy.get("unit"), record.privacy.get("delta")
        parts.append(f"epsilon {spent} per {unit} (delta {delta:g})")
    parts.append(f"{record.wall_s:.1f} s")
    for name in ("late", "left", "exhausted"):
        if devices := getattr(record, name):
            parts.append(f"{name}: {', '.join(map(str, devices))}")
    if record.arrived:
        arrived = (f"{one.device} (of round {one.since})" for one in record.arrived)
        parts.append(f"arrived: {', '.join(arrived)}")
    if record.failures:
        failed = ", ".join(failure.who for failure in record.failures)
        parts.append(f"failed: {failed}")
    return "  ".join(parts)


def summary_table(records: Sequence[RoundRecord], folder: Path) -> Table:
    """Return the rounds as a table that names `folder`; of a long run, its first and last ones.

    Columns of the modelled system stand apart, on the right, and say so.
    """
    accuracy = any(record.accuracy is not None for record in records)
    macro_f1 = any(record.macro_f1 is not None for record in records)
    perplexity = any(record.perplexity is not None for record in records)
    central = any(record.central is not None for record in records)
    modelled = [
        key for key in _MODELLED if any(key in (record.modelled or {}) for record in records)
    ]
    table = Table(title=f"Results in {plain_text(folder)}", title_justify="left")
    headings = ["round", "train loss", "eval loss", *["central loss"] * central]
    headings += ["perplexity"] * perplexity + ["accuracy"] * accuracy
    headings += ["macro F1"] * macro_f1
    headings += ["up", "down", "wall s", "devices", "failed"]
    headings += [f"modelled {_MODELLED[key]}" for key in modelled]
    for heading in headings:
        table.add_column(heading, justify="right")
    for record in _shown(records):
        if record is None:
            table.add_row(*["..."] * len(headings))
            continue
        row = [str(record.round), _number(record.train_loss), _number(record.eval_loss)]
        row += [_number((record.central or {}).get("loss"))] * central
        row += [_number(record.perplexity)] * perplexity
        row += [_number(record.accuracy)] * accuracy
        row += [_number(record.macro_f1)] * macro_f1
        row += [
            megabytes(sum(record.bytes_up.values())),
            megabytes(sum(record.bytes_down.values())),
            f"{record.wall_s:.1f}",
            str(len(record.participants)),
            str(len(record.failures)),
        ]
        row += [_number((record.modelled or {}).get(key)) for key in modelled]
        table.add_row(*row)
    return table


def megabytes(count: int) -> str:
    """Return a number of bytes in megabytes (10^6 bytes)."""
    return f"{count / 1e6:.2f} MB"


def _number(value: float | None) -> str:
    """Return four significant digits, or a dash for nothing."""
    return "-" if value is None else f"{value:.4g}"


def _shown(records: Sequence[RoundRecord]) -> list[RoundRecord | None]:
    """Return the records to show; None stands for those left out."""
    if len(records) <= _FIRST + _LAST:
        return list(records)
    return [*records[:_FIRST], None, *records[-_LAST:]]
