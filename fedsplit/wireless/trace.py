"""Links that were recorded elsewhere, replayed: rates, signal-to-noise ratios or gains.

Which of them is told by the file:

- CSV with the columns ``round`` or ``time_s``, ``device``, ``uplink_bps``, ``downlink_bps``.
- Sionna RT: ``numpy.savez(FILE, a=a, sampling_frequency=f)`` of what ``Paths.cir(out_type="numpy",
  num_time_steps=n, sampling_frequency=f)`` returns; devices are receivers of one transmitter.
- DeepMIMO 4: ``numpy.savez(FILE, power=dataset.power)`` of a transmitter (or a ``.mat`` with that).
- ns-3's LTE module: ``DlRsrpSinrStats.txt`` and, as the way up, ``UlSinrStats.txt``.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from fedsplit.arrays import Array
from fedsplit.errors import FedsplitError, require
from fedsplit.wireless.exports import read_arrays, read_ns3

COLUMNS = ("device", "uplink_bps", "downlink_bps")
ROUND, TIME = "round", "time_s"
RATE, SINR, GAIN = "rate", "sinr", "gain"
MAX_RATE_BPS = 1e12
_MOST = {RATE: MAX_RATE_BPS, SINR: 1e30, GAIN: 1.0}


@dataclass(frozen=True, eq=False, kw_only=True)
class Recording:
    """One direction of the links of all devices.

    Parameters
    ----------
    values : ndarray
        Shape ``[times, devices]``.
    times_s : ndarray or None
        From when on each row holds, ascending from 0; None: a row is a round.
    """

    values: Array
    times_s: Array | None = None

    def at(self, round_: int, time_s: float) -> Array:
        """Return the row of a round, or of a time; a longer run starts again from the first."""
        count = len(self.values)
        times = self.times_s
        if times is None or count == 1:
            row: Array = self.values[round_ % count]
            return row
        whole_s = times[-1] * count / (count - 1)  # the last row holds as long as the others do
        place = np.searchsorted(times, time_s % whole_s * (1 + 1e-12), side="right") - 1
        held: Array = self.values[place]
        return held


@dataclass(frozen=True, eq=False, kw_only=True)
class Trace:
    """Recorded links.

    Parameters
    ----------
    kind : str
        "rate": bit/s of a device that has the whole band to itself; "sinr": signal-to-noise ratio
        over the whole band, linear; "gain": power gain, linear.
    up, down : Recording
        Both directions. Device `n` of a larger fleet replays device ``n % devices``.
    """

    kind: str
    up: Recording
    down: Recording

    @property
    def is_timed(self) -> bool:
        """Whether links change within a round."""
        return self.up.times_s is not None or self.down.times_s is not None


def read_trace(path: str | Path, uplink: str | Path | None = None) -> Trace:
    """Read a trace; its way up from another file, where that is given.

    Raises
    ------
    FedsplitError
        If a file cannot be read, or holds what it must not; names the file, where it has lines the
        line, and what is allowed.
    """
    found = _read(Path(path))
    if uplink is None:
        return found
    other = _read(Path(uplink))
    counts = other.up.values.shape[1], found.down.values.shape[1]
    require(
        other.kind == found.kind, f"{uplink}", other.kind, f"of the kind {found.kind}, as {path}"
    )
    require(counts[0] == counts[1], f"{uplink}: devices", counts[0], f"{counts[1]}, as in {path}")
    return replace(found, up=other.up)


def _read(path: Path) -> Trace:
    if path.suffix in (".npz", ".mat"):
        return _both(path, GAIN, *read_arrays(path))
    try:
        with path.open(encoding="utf-8") as file:
            is_ns3 = file.read(1) == "%"
    except (OSError, UnicodeDecodeError) as error:
        raise FedsplitError(f"{path}: cannot be read as a CSV file: {error}") from error
    return _both(path, SINR, *read_ns3(path)) if is_ns3 else _read_csv(path)


def _both(path: Path, kind: str, values: Array, times_s: Array | None) -> Trace:
    """Return a trace of links that are the same both ways."""
    inside = np.isfinite(values) & (values > 0) & (values <= _MOST[kind])
    allowed = f"above 0 and up to {_MOST[kind]:g} everywhere"
    worst = values[~inside]
    first = float(worst[0]) if worst.size else 0.0
    require(worst.size == 0, f"{path}: {kind}", first, allowed)
    way = Recording(values=values, times_s=times_s)
    return Trace(kind=kind, up=way, down=way)


def _read_csv(path: Path) -> Trace:
    """Read a CSV of rates: every pair of a round, or a time, and a device has exactly one line."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            given = reader.fieldnames or ()
            when = TIME if TIME in given and ROUND not in given else ROUND
            columns = (when, *COLUMNS)
            missing = [name for name in columns if name not in given]
            if missing:
                raise FedsplitError(
                    f"{path}: line 1: column {missing[0]} is missing; "
                    f"must have the columns {', '.join(columns)}"
                )
            rates: dict[tuple[float, int], tuple[float, float]] = {}
            for row in reader:
                place = f"{path}: line {reader.line_num}"
                key = _time(place, row) if when == TIME else _index(place, row, ROUND)
                pair = (key, _index(place, row, "device"))
                if pair in rates:
                    raise FedsplitError(f"{place}: {when}={pair[0]:g}, device={pair[1]}: repeated")
                rates[pair] = (_rate(place, row, "uplink_bps"), _rate(place, row, "downlink_bps"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FedsplitError(f"{path}: cannot be read as a CSV file: {error}") from error
    if not rates:
        raise FedsplitError(f"{path}: must have at least one line of rates")
    known = sorted({turn for turn, _ in rates})
    turns = known if when == TIME else list(range(1 + int(known[-1])))
    n_devices = 1 + max(device for _, device in rates)
    if len(rates) != len(turns) * n_devices:
        pairs = ((turn, device) for turn in turns for device in range(n_devices))
        gap = next(pair for pair in pairs if pair not in rates)
        raise FedsplitError(
            f"{path}: {when}={gap[0]:g}, device={gap[1]}: missing; "
            f"every device must have a line in every {when.removesuffix('_s')}"
        )
    table = np.array([rates[pair] for pair in sorted(rates)]).reshape(len(turns), n_devices, 2)
    times_s = _from_zero(turns) if when == TIME else None
    up, down = (Recording(values=table[..., way], times_s=times_s) for way in (0, 1))
    return Trace(kind=RATE, up=up, down=down)


def _from_zero(times_s: ArrayLike) -> Array:
    times = np.asarray(times_s, dtype=np.float64)
    held: Array = times - times[0]
    return held


def _index(place: str, row: Mapping[str, str], name: str) -> int:
    text = row[name]
    if text is None or not text.strip().isdecimal() or len(text.strip()) > 9:
        raise FedsplitError(f"{place}: {name}={text!r}: must be a whole number from 0")
    return int(text)


def _time(place: str, row: Mapping[str, str]) -> float:
    try:
        value = float(row[TIME])
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise FedsplitError(f"{place}: {TIME}={row[TIME]!r}: must be a number from 0")
    return value


def _rate(place: str, row: Mapping[str, str], name: str) -> float:
    allowed = f"a number above 0 and up to {MAX_RATE_BPS:g}"
    try:
        value = float(row[name])
    except (TypeError, ValueError) as error:
        raise FedsplitError(f"{place}: {name}={row[name]!r}: must be {allowed}") from error
    if not (math.isfinite(value) and 0 < value <= MAX_RATE_BPS):
        raise FedsplitError(f"{place}: {name}={row[name]!r}: must be {allowed}")
    return value
