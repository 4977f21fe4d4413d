"""Rows of a table (.csv, .jsonl, Hugging Face data set) to examples."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.data.examples import Example, Pair, Picture, Text
from fedsplit.data.spec import DataSpec
from fedsplit.errors import FedsplitError

Row = Mapping[str, Any]

TABLES = (".csv", ".jsonl")


def read_table(path: Path) -> list[Row]:
    """Return the rows of a .csv or .jsonl file.

    Raises
    ------
    FedsplitError
        If a line of a .jsonl file is no JSON object.
    """
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise FedsplitError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise FedsplitError(f"{path}, line {number}: must be a JSON object")
            rows.append(row)
    return rows


def require_columns(row: Row, columns: Iterable[str], where: str) -> None:
    """Raise a `FedsplitError` unless `row` has a value in each of `columns`."""
    for column in columns:
        if row.get(column) is None:
            raise FedsplitError(
                f"{where}: no value in column {column!r}; columns are {', '.join(map(str, row))}"
            )


def examples_of(rows: Sequence[Row], spec: DataSpec, origins: Sequence[int]) -> list[Example]:
    """Return one example per row, of the kind and from the columns that `spec` names.

    Parameters
    ----------
    rows : sequence of mappings
        Values by column.
    spec : DataSpec
        Its ``*_column`` fields.
    origins : sequence of int
        Group of each row where `spec` has no `label_column`.

    Raises
    ------
    FedsplitError
        If a row lacks a column.
    """
    make, columns = _kind(spec)
    for row in rows:
        require_columns(row, columns, f"data.source={spec.source!r}")
    groups = origins
    if spec.label_column is not None:
        groups = _codes([row[spec.label_column] for row in rows])
    return [make(row, group) for row, group in zip(rows, groups, strict=True)]


def _kind(spec: DataSpec) -> tuple[Any, list[str]]:
    """Return how to make an example of a row and its group, and the columns that takes."""
    labels = [] if spec.label_column is None else [spec.label_column]
    image, prompt, target, text = (
        spec.image_column,
        spec.prompt_column,
        spec.target_column,
        spec.text_column,
    )
    if image is not None:
        return lambda row, group: Picture(_pixels(row[image]), group), [image, *labels]
    if prompt is not None and target is not None:
        return (
            lambda row, group: Pair(str(row[prompt]), str(row[target]), group),
            [prompt, target, *labels],
        )
    return lambda row, group: Text(str(row[text]), group), [text, *labels]


def _codes(labels: list[Any]) -> list[int]:
    """Return whole-number labels as they are, and others by their place in sorted order."""
    if all(isinstance(label, int) for label in labels):
        return labels
    names = sorted({str(label) for label in labels})
    codes = {name: code for code, name in enumerate(names)}
    return [codes[str(label)] for label in labels]


def _pixels(image: Any) -> NDArray[np.uint8]:
    """Return a PIL image as uint8 ``[3, height, width]``."""
    return np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
