"""Rows of a table (a file, a Hugging Face data set) to examples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.data.chat import messages_of
from fedsplit.data.examples import Chat, Example, Labelled, Pair, Picture, Text
from fedsplit.data.spec import LABEL, DataSpec
from fedsplit.errors import FedsplitError, require

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of one origin: what it is called in messages, and the group of its rows."""

    file: str
    rows: Sequence[Row]
    group: int = 0


def value_of(row: Row, column: str, where: str) -> Any:
    """Return what stands in a column.

    Raises
    ------
    FedsplitError
        If the row has no such column, or no value there.
    """
    value = row.get(column)
    if value is None or (isinstance(value, float) and np.isnan(value)):
        raise FedsplitError(
            f"{where}: no value in column {column!r}; columns are {', '.join(map(str, row))}"
        )
    return value


def text_of(row: Row, column: str, where: str) -> str:
    """Return the text in a column; numbers are written out.

    Raises
    ------
    FedsplitError
        If there is no value, or one that is neither text nor a number: how Python would write a
        list or an object is no text to learn.
    """
    value = value_of(row, column, where)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | Decimal) and value is not True and value is not False:
        return str(value)
    message = f"{where}: column {column!r} holds {_kind_of(value)}, must be text or numbers"
    if isinstance(value, list) and value and isinstance(value[0], Mapping) and "role" in value[0]:
        message += "; conversations are read by data=chat"
    raise FedsplitError(message)


def examples_of(tables: Sequence[Table], spec: DataSpec) -> list[Example]:
    """Return one example per row, of the kind and from the columns that `spec` names.

    Parameters
    ----------
    tables : sequence of Table
        Rows. A row's group is the table's, where `spec` has no `label_column`.
    spec : DataSpec
        Its ``*_column`` fields.

    Raises
    ------
    FedsplitError
        If a row lacks a value or has one of the wrong kind; names file and row.
    """
    make = _maker(spec)
    places = [
        (table, number, row) for table in tables for number, row in enumerate(table.rows, start=1)
    ]
    groups = [table.group for table, _, _ in places]
    if spec.label_column is not None:
        labels = [_label(row, spec.label_column, t.file, n) for t, n, row in places]
        groups = _codes(labels) if spec.loss_on != LABEL else _classes(labels, places, spec)
    return [
        make(row, group, table.file, number)
        for (table, number, row), group in zip(places, groups, strict=True)
    ]


def _maker(spec: DataSpec) -> Callable[[Row, int, str, int], Example]:
    """Return what makes an example of a row, its group, file and number."""
    image, prompt, target, text = (
        spec.image_column,
        spec.prompt_column,
        spec.target_column,
        spec.text_column,
    )

    def picture(row: Row, group: int, file: str, number: int) -> Example:
        where = f"{file}, row {number}"
        return Picture(_pixels(value_of(row, str(image), where), where), group, file=file)

    def chat(row: Row, group: int, file: str, number: int) -> Example:
        messages = messages_of(row, spec, f"{file}, row {number}", text_of)
        return Chat(messages, group, file=file, row=number)

    def pair(row: Row, group: int, file: str, number: int) -> Example:
        where = f"{file}, row {number}"
        asked, answer = text_of(row, str(prompt), where), text_of(row, str(target), where)
        return Pair(asked, answer, group, file=file, row=number)

    def plain(row: Row, group: int, file: str, number: int) -> Example:
        return Text(text_of(row, text, f"{file}, row {number}"), group, file=file, row=number)

    def labelled(row: Row, group: int, file: str, number: int) -> Example:
        where = f"{file}, row {number}"
        second = None if spec.pair_column is None else text_of(row, spec.pair_column, where)
        return Labelled(text_of(row, text, where), second, group, file=file, row=number)

    if image is not None:
        return picture
    if spec.loss_on == LABEL:
        return labelled
    if spec.source == "chat":
        return chat
    return plain if prompt is None else pair


def _label(row: Row, column: str, file: str, number: int) -> Any:
    where = f"{file}, row {number}"
    value = value_of(row, column, where)
    if not isinstance(value, str | int | float | Decimal):
        raise FedsplitError(
            f"{where}: column {column!r} holds {_kind_of(value)}, must be a label: text or a number"
        )
    return value


def _codes(labels: list[Any]) -> list[int]:
    """Return whole-number labels as they are, and others by their place in sorted order."""
    if all(isinstance(label, int) for label in labels):
        return labels
    names = sorted({str(label) for label in labels})
    codes = {name: code for code, name in enumerate(names)}
    return [codes[str(label)] for label in labels]


def class_names(tables: Sequence[Table], spec: DataSpec) -> tuple[str, ...]:
    """Return the names of the classes that the rows of `tables` are of, in order.

    Raises
    ------
    FedsplitError
        If a row has no label, or there is one class only.
    """
    if spec.labels is not None:
        return spec.labels
    column = str(spec.label_column)
    names = {
        str(_label(row, column, table.file, number))
        for table in tables
        for number, row in enumerate(table.rows, start=1)
    }
    require(len(names) >= 2, "data.label_column", column, "a column with at least two labels")
    numbers = all(name.removeprefix("-").isdigit() for name in names)
    return tuple(sorted(names, key=int if numbers else str))


def _classes(
    labels: list[Any], places: Sequence[tuple[Table, int, Row]], spec: DataSpec
) -> list[int]:
    """Return the class of each label."""
    names = spec.labels or ()
    codes = {name: code for code, name in enumerate(names)}
    for label, (table, number, _) in zip(labels, places, strict=True):
        if str(label) not in codes:
            raise FedsplitError(
                f"{table.file}, row {number}: label {str(label)!r:.80} must be one of "
                f"{', '.join(names)}"
            )
    return [codes[str(label)] for label in labels]


def _pixels(image: Any, where: str) -> NDArray[np.uint8]:
    """Return a PIL image as uint8 ``[3, height, width]``."""
    if not hasattr(image, "convert"):
        raise FedsplitError(f"{where}: holds {_kind_of(image)}, must be an image")
    return np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)


def _kind_of(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "lists"
    if isinstance(value, Mapping):
        return "objects"
    return "true or false" if isinstance(value, bool) else f"a {type(value).__name__}"
