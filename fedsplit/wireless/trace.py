"""Measured rates from a CSV file, replayed round by round."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsplit.arrays import Array
from fedsplit.errors import FedsplitError

COLUMNS = ("round", "device", "uplink_bps", "downlink_bps")
MAX_RATE_BPS = 1e12


@dataclass(frozen=True, eq=False)
class RateTrace:
    """Rates of each device when it has the whole band to itself.

    Parameters
    ----------
    uplink_bps, downlink_bps : ndarray
        Shape ``[rounds, devices]``, above 0.
    """

    uplink_bps: Array
    downlink_bps: Array

    @property
    def n_rounds(self) -> int:
        """Rounds recorded; a longer run starts again from the first."""
        return len(self.uplink_bps)

    @property
    def n_devices(self) -> int:
        """Devices recorded; device `n` of a larger fleet replays device ``n % n_devices``."""
        return int(self.uplink_bps.shape[1])


def read_trace(path: str | Path) -> RateTrace:
    """Read a trace from a CSV file with the columns ``round,device,uplink_bps,downlink_bps``.

    Rounds and devices count from 0 without gaps; every pair has exactly one line, in any order.

    Raises
    ------
    FedsplitError
        If the file cannot be read, a column is missing, a value is no number or out of range, or a
        pair is missing or repeated; names the file, the line, the field and what is allowed.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise FedsplitError(
                    f"{path}: line 1: column {missing[0]} is missing; "
                    f"must have the columns {', '.join(COLUMNS)}"
                )
            rates: dict[tuple[int, int], tuple[float, float]] = {}
            for row in reader:
                place = f"{path}: line {reader.line_num}"
                pair = (_index(place, row, "round"), _index(place, row, "device"))
                if pair in rates:
                    raise FedsplitError(f"{place}: round={pair[0]}, device={pair[1]}: repeated")
                rates[pair] = (_rate(place, row, "uplink_bps"), _rate(place, row, "downlink_bps"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FedsplitError(f"{path}: cannot be read as a CSV file: {error}") from error
    if not rates:
        raise FedsplitError(f"{path}: must have at least one line of rates")
    n_rounds, n_devices = (1 + max(pair[axis] for pair in rates) for axis in (0, 1))
    if len(rates) != n_rounds * n_devices:
        gap = next(
            (turn, device)
            for turn in range(n_rounds)
            for device in range(n_devices)
            if (turn, device) not in rates
        )
        raise FedsplitError(
            f"{path}: round={gap[0]}, device={gap[1]}: missing; "
            "every device must have a line in every round"
        )
    table = np.array([rates[pair] for pair in sorted(rates)]).reshape(n_rounds, n_devices, 2)
    return RateTrace(table[..., 0], table[..., 1])


def _index(place: str, row: dict[str, str], name: str) -> int:
    text = row[name]
    if text is None or not text.strip().isdecimal() or len(text.strip()) > 9:
        raise FedsplitError(f"{place}: {name}={text!r}: must be a whole number from 0")
    return int(text)


def _rate(place: str, row: dict[str, str], name: str) -> float:
    allowed = f"a number above 0 and up to {MAX_RATE_BPS:g}"
    try:
        value = float(row[name])
    except (TypeError, ValueError) as error:
        raise FedsplitError(f"{place}: {name}={row[name]!r}: must be {allowed}") from error
    if not (math.isfinite(value) and 0 < value <= MAX_RATE_BPS):
        raise FedsplitError(f"{place}: {name}={row[name]!r}: must be {allowed}")
    return value
