"""Files that are whole at any time: written beside, then moved into place."""

import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedsplit.errors import FedsplitError


@contextmanager
def needed(path: Path) -> Iterator[None]:
    """Say in one line that `path` cannot be written, as on a full disk.

    Raises
    ------
    FedsplitError
        In place of what the system says.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise FedsplitError(f"{path}: cannot be written ({why})") from error


@contextmanager
def spared(path: Path) -> Iterator[None]:
    """Go on without `path` where it cannot be written: it is for the eye, a run needs it not."""
    try:
        yield
    except (OSError, FedsplitError) as error:
        logging.getLogger(__name__).warning("%s is left out: %s", path, error)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`, so that a reader sees the old content or the new, never a part.

    Raises
    ------
    FedsplitError
        If it cannot be written; the old content is still there.
    """
    beside = path.with_name(f".{path.name}.part")
    with needed(path):
        with beside.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)


def json_text(value: Any) -> str:
    """Return `value` as indented JSON."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return `rows` as CSV with every column that any of them has, in order of appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
