"""Boards of your own from a CSV file: a table of what each can do."""

import csv
from pathlib import Path

from fedsplit.errors import FedsplitError, SettingsError, require
from fedsplit.fleet.catalogue import Processor

NEEDED = ("name", "flops_per_s", "memory_bytes", "power_w")
OPTIONAL = ("max_hz", "min_hz", "count")
_CLOCK_HZ = 1e9


def read_boards(path: str | Path) -> tuple[dict[str, Processor], tuple[str, ...]]:
    """Return the boards of a file by name, and the names as often as each is to be dealt out.

    The columns are those of `NEEDED`: name, peak FLOP/s at the highest clock, memory, and power
    while computing; and, where the file has them, highest and lowest clock (without: 1 GHz, which
    cannot be lowered) and `count`.

    Raises
    ------
    FedsplitError
        If the file cannot be read, or a value is missing, no number or out of range; names the
        file, the line and the column.
    """
    boards: dict[str, Processor] = {}
    dealt: list[str] = []
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            given = tuple(reader.fieldnames or ())
            unknown = [name for name in given if name not in (*NEEDED, *OPTIONAL)]
            missing = [name for name in NEEDED if name not in given]
            allowed = (
                f"the columns {', '.join(NEEDED)}, and {', '.join(OPTIONAL)} if they are known"
            )
            require(not unknown and not missing, f"{path}: line 1", ",".join(given), allowed)
            for row in reader:
                place = f"{path}: line {reader.line_num}"
                name = (row["name"] or "").strip()
                require(bool(name) and name not in boards, f"{place}: name", name, "a new name")
                boards[name] = _board(place, row)
                count = _number(place, row, "count", 1.0)
                whole = count >= 0 and count == int(count)
                require(whole, f"{place}: count", row.get("count"), "a whole number, at least 0")
                dealt += [name] * int(count)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FedsplitError(f"{path}: cannot be read as a CSV file: {error}") from error
    require(bool(dealt), str(path), "no board", "at least one")
    return boards, tuple(dealt)


def _board(place: str, row: dict[str, str]) -> Processor:
    top_hz = _number(place, row, "max_hz", _CLOCK_HZ)
    require(top_hz > 0, f"{place}: max_hz", top_hz, "above 0")
    try:
        return Processor(
            flops_per_cycle=_number(place, row, "flops_per_s") / top_hz,
            min_hz=_number(place, row, "min_hz", top_hz),
            max_hz=top_hz,
            memory_bytes=_number(place, row, "memory_bytes"),
            power_w=_number(place, row, "power_w"),
            source=place,
        )
    except SettingsError as error:
        name = error.field.removeprefix("processor.").replace("flops_per_cycle", "flops_per_s")
        raise SettingsError(f"{place}: {name}", error.value, error.allowed) from error


def _number(place: str, row: dict[str, str], name: str, default: float | None = None) -> float:
    text = row.get(name)
    if default is not None and (text is None or not text.strip()):
        return default
    try:
        return float(text or "")
    except ValueError as error:
        raise SettingsError(f"{place}: {name}", text, "a number") from error
