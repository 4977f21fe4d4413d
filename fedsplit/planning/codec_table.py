"""Measured settings: how much each codec compresses and what it does to the loss.

A table may say the same of ranks of adapters and of devices that only infer: rows whose name is
``rank`` (settings ``{"r": 4}``) or ``frozen`` (``{"cut": 2}``).
"""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsplit.arrays import Array
from fedsplit.errors import FedsplitError, SettingsError, require
from fedsplit.planning.errors import checked

COLUMNS = ("ratio", "loss_increase", "name", "settings")
WAYS = {"rank": "r", "frozen": "cut"}
"""Names of rows that are no codecs, and what their settings say: components, or frozen blocks."""
_ITEMSIZE = 4


@dataclass(frozen=True, eq=False)
class CodecTable:
    """Codec settings with what was measured of each; `fedsplit calibrate` writes it.

    Parameters
    ----------
    ratio : ndarray
        Sent over raw bits, above 0, shape ``[M]``.
    loss_increase : ndarray
        Rise of the evaluation loss against no compression, shape ``[M]``. Measured, so it may be
        slightly negative.
    settings : tuple of dict
        What `fedsplit.codec.make_codec` reads, ``name`` included.
    itemsize : int
        Bytes of an uncompressed element that the ratios are relative to.
    ranks : mapping of int to float
        Rise of the loss by training adapters of so many components.
    frozen : mapping of int to float
        Rise of the loss if so many blocks on the device only infer.

    Raises
    ------
    FedsplitError
        If the columns differ in length, are empty, or a value is not finite.
    """

    ratio: Array
    loss_increase: Array
    settings: tuple[dict[str, Any], ...]
    itemsize: int = 4
    ranks: Mapping[int, float] = field(default_factory=dict)
    frozen: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ratio = checked("ratio", np.atleast_1d(self.ratio), positive=True)
        loss = np.atleast_1d(np.asarray(self.loss_increase, dtype=np.float64))
        require(len(ratio) > 0, "rows of a codec table", len(ratio), "at least 1")
        same = ratio.shape == loss.shape == (len(self.settings),)
        require(same, "codec table columns", (len(ratio), len(loss), len(self.settings)), "equal")
        finite = bool(np.isfinite(loss).all())
        require(finite, "loss_increase", loss.tolist(), "finite")
        for name in ("ranks", "frozen"):
            losses = list(getattr(self, name).values())
            require(bool(np.isfinite(losses).all()), f"loss_increase of {name}", losses, "finite")
        object.__setattr__(self, "ratio", ratio)
        object.__setattr__(self, "loss_increase", loss)

    def __len__(self) -> int:
        return len(self.ratio)

    @classmethod
    def read_csv(cls, path: str | Path) -> "CodecTable":
        """Read a table with the columns ``ratio, loss_increase, name, settings`` (JSON).

        A column ``itemsize`` says how many bytes an uncompressed element had, the same in all
        lines; 4 without it.

        Raises
        ------
        FedsplitError
            If the file, a column or a value is missing or malformed; names file and line.
        """
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except OSError as error:
            raise FedsplitError(f"codec table {path}: {error.strerror}") from error
        ratios, losses, settings = [], [], []
        ways: dict[str, dict[int, float]] = {name: {} for name in WAYS}
        widths: set[int] = set()
        for line, row in enumerate(rows, start=2):
            missing = [name for name in COLUMNS if row.get(name) is None]
            require(not missing, f"{path} line {line}", missing, f"a row of {', '.join(COLUMNS)}")
            try:
                if row["name"] in WAYS:
                    size = way_size({"name": row["name"], **json.loads(row["settings"])})
                    ways[row["name"]][size] = float(row["loss_increase"])
                    continue
                ratios.append(float(row["ratio"]))
                losses.append(float(row["loss_increase"]))
                settings.append({"name": row["name"], **json.loads(row["settings"])})
                widths.add(int(row.get("itemsize") or _ITEMSIZE))
            except (ValueError, TypeError, FedsplitError) as error:
                raise FedsplitError(f"{path} line {line}: {error}") from error
        if rows and not settings:
            ratios, losses, settings = [1.0], [0.0], [{"name": "identity"}]
        itemsize = min(widths, default=_ITEMSIZE)
        alike = len(widths) <= 1 and itemsize > 0
        require(alike, f"{path} itemsize", sorted(widths), "one positive number in all lines")
        return cls(
            np.array(ratios),
            np.array(losses),
            tuple(settings),
            itemsize,
            ranks=ways["rank"],
            frozen=ways["frozen"],
        )

    def at(self, itemsize: int) -> "CodecTable":
        """Return the table for boundaries of elements of `itemsize` bytes.

        A codec makes the same bytes of an element whatever its width, so that ratios change with
        it; only what is sent as it lies in memory keeps its ratio.
        """
        as_is = np.array([setting["name"] == "identity" for setting in self.settings])
        ratio = np.where(as_is, self.ratio, self.ratio * (self.itemsize / itemsize))
        return replace(self, ratio=ratio, itemsize=itemsize)

    def take(self, rows: list[int]) -> "CodecTable":
        """Return the table of these rows, in this order."""
        return replace(
            self,
            ratio=self.ratio[rows],
            loss_increase=self.loss_increase[rows],
            settings=tuple(self.settings[row] for row in rows),
        )

    def envelope(self) -> "CodecTable":
        """Return the settings worth using, by rising ratio and strictly falling loss.

        Every other setting is beaten by one that compresses at least as much and harms no more.
        """
        rows: list[int] = []
        for row in np.lexsort((self.loss_increase, self.ratio)):
            if not rows or self.loss_increase[row] < self.loss_increase[rows[-1]]:
                rows.append(int(row))
        return self.take(rows)

    def hull(self) -> "CodecTable":
        """Return the settings on the lower convex hull of the envelope.

        Between neighbours the loss is interpolated: the convex curve that relaxations use.
        """
        table = self.envelope()
        rows: list[int] = []
        for row in range(len(table)):
            while len(rows) > 1 and _above(table, rows[-2], rows[-1], row):
                rows.pop()
            rows.append(row)
        return table.take(rows)


def _above(table: CodecTable, left: int, middle: int, right: int) -> bool:
    """Return whether `middle` lies on or above the line from `left` to `right`."""
    run = table.ratio[[middle, right]] - table.ratio[left]
    rise = table.loss_increase[[middle, right]] - table.loss_increase[left]
    return bool(rise[0] * run[1] >= rise[1] * run[0])


def way_size(settings: Mapping[str, object]) -> int:
    """Return the rank, or the number of frozen blocks, of a row that is no codec.

    Raises
    ------
    FedsplitError
        If the settings are anything else.
    """
    name = str(settings["name"])
    key = WAYS[name]
    require(settings.keys() == {"name", key}, f"{name} settings", dict(settings), f"{key} alone")
    size = settings[key]
    if not (isinstance(size, int) and not isinstance(size, bool) and size >= 1):
        raise SettingsError(f"{name}.{key}", size, "a whole number of at least 1")
    return size
