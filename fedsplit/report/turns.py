"""turns.csv: one row for each turn of a device, appended round by round."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fedsplit.errors import FedsplitError

TURNS = "turns.csv"


@dataclass(frozen=True, kw_only=True)
class TurnRow:
    """What one turn of a device did, or why it was lost; measured, but for what says "modelled".

    Parameters
    ----------
    round : int
        The round; 0 is the evaluation before any training.
    phase : str
        "train" or "evaluate".
    device : int
        Its index.
    site : str
        The name that its node was started with (``site=`` in the node's configuration).
    route : str
        The segments that it was cut in, ``device[0:2] -> server[2:8]``.
    samples, steps, targets : int
        Samples and mini-batches that it went through, and what the loss was taken over.
    loss : float or None
        Mean loss per target (nats).
    accuracy : float or None
        Share of targets predicted right, where they are counted.
    bytes_up, bytes_down : int
        Boundaries, gradients and labels on the device's link, counted on the wire.
    backhaul_bytes_up, backhaul_bytes_down : int
        The same between its edge and the cloud.
    adapter_bytes_up, adapter_bytes_down : int
        Adapters on the device's link; those in Flower's messages are not among them.
    compute_s, link_s : float
        Wall seconds that the device computed, and that it waited for the rest of its route.
    wall_s : float
        Wall seconds from the turn's begin to its answer, as the server saw it: loading, waiting for
        a place and Flower's messages are among them.
    peak_bytes : int
        The most resident memory of the device's process during the turn, libraries included, and
        what torch took on a GPU. In a simulation the process is a worker that devices share. 0
        where the system does not tell.
    modelled_compute_s, modelled_link_s : float or None
        What `compute_s` and `link_s` are on the modelled system, of a turn that trained.
    failure : str
        Why the turn was lost; it is empty where it was not. A lost turn has no numbers.
    """

    round: int
    phase: str
    device: int
    site: str = ""
    route: str = ""
    samples: int = 0
    steps: int = 0
    targets: int = 0
    loss: float | None = None
    accuracy: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    backhaul_bytes_up: int = 0
    backhaul_bytes_down: int = 0
    adapter_bytes_up: int = 0
    adapter_bytes_down: int = 0
    compute_s: float = 0.0
    link_s: float = 0.0
    wall_s: float = 0.0
    peak_bytes: int = 0
    modelled_compute_s: float | None = None
    modelled_link_s: float | None = None
    failure: str = ""


_COLUMNS = [field.name for field in fields(TurnRow)]


def append_turns(folder: Path, rows: Sequence[TurnRow]) -> None:
    """Add `rows` to the folder's turns.csv, and wait until they are on disk.

    What was there before is not written again, so that a round costs the same at any time of a
    run. A kill in the middle may leave a part of these rows, which `cut_turns` takes away.
    """
    if not rows:
        return
    with (folder / TURNS).open("a", encoding="utf-8", newline="") as file:
        text = io.StringIO()
        writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(_plain(vars(row)) for row in rows)
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def read_turns(folder: Path) -> list[TurnRow]:
    """Return the turns of a run, in the order of rounds; none where there is no turns.csv.

    Raises
    ------
    FedsplitError
        If a row is not one that `append_turns` wrote.
    """
    return [_row(values, folder / TURNS) for values in _lines(folder)]


def cut_turns(folder: Path, last_round: int) -> None:
    """Take away the turns after `last_round`, and what a kill left of a row."""
    if (folder / TURNS).exists():
        whole = [values for values in _lines(folder) if None not in values.values()]
        kept = [
            row for values in whole if (row := _row(values, folder / TURNS)).round <= last_round
        ]
        (folder / TURNS).unlink()
        append_turns(folder, kept)


def _lines(folder: Path) -> Iterable[dict[str, Any]]:
    path = folder / TURNS
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return `row` with text on one line, so that any reader of lines counts turns."""
    return {
        name: " ".join(value.split()) if isinstance(value, str) else value
        for name, value in row.items()
    }


def _row(values: dict[str, Any], path: Path) -> TurnRow:
    try:
        found = {field.name: _value(field.type, values[field.name]) for field in fields(TurnRow)}
    except (KeyError, TypeError, ValueError) as error:
        raise FedsplitError(f"{path}: is not a table of turns ({error!r})") from error
    return TurnRow(**found)


def _value(kind: Any, text: str | None) -> Any:
    if text is None:
        raise ValueError("a row is not whole")
    if kind in (int, float, str):
        return kind(text)
    return float(text) if text else None
