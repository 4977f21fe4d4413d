"""The one table of a study: a row per run, round, device and metric."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from fedsplit.errors import FedsplitError, SettingsError, require
from fedsplit.report.records import RoundRecord
from fedsplit.report.run import CONFIG, RESULTS, read_records
from fedsplit.report.studies.members import DONE, MemberRecord, read_members
from fedsplit.report.turns import read_turns

TABLE = "table.parquet", "table.csv"
MEASURED, MODELLED = "measured", "modelled"
COSTS = (
    "delay_s",
    "waiting_s",
    "energy_j",
    "device_energy_j",
    "server_energy_j",
    "uplink_bytes",
    "downlink_bytes",
    "backhaul_bytes",
    "traffic_bytes",
    "wall_s",
    "bytes_up.device",
    "bytes_up.edge",
    "bytes_down.device",
    "bytes_down.edge",
)
"""Metrics that add up over the rounds of a run; of all others the value of a round counts."""
PEAKS = ("device_peak_bytes", "server_peak_bytes")
"""Metrics of which a run has the largest of its rounds."""
_MEANS = ("loss", "accuracy")
_ALWAYS = ("strategy", "seed")
_WHERE = {"strategy": ("strategy", "name"), "seed": ("seed",)}


@dataclass(frozen=True, eq=False)
class Study:
    """Runs side by side; one run alone is a study of one.

    Parameters
    ----------
    folder : Path
        Of the study, or of the run.
    members : tuple of MemberRecord
        Every run, those that failed too.
    """

    folder: Path
    members: tuple[MemberRecord, ...]

    @classmethod
    def open(cls, folder: str | Path) -> "Study":
        """Return the study, or the run, in `folder`.

        Raises
        ------
        FedsplitError
            If it holds neither.
        """
        place = Path(folder)
        members = tuple(read_members(place))
        if not members:
            there = (place / RESULTS).is_file()
            require(there, "STUDY", str(folder), "the folder of a study or of a run")
            members = (MemberRecord(name=place.name, folder="", swept={}, status=DONE),)
        return cls(place, members)

    @property
    def keys(self) -> tuple[str, ...]:
        """What runs differ in: scheme and seed, then all else that is swept over."""
        swept = dict.fromkeys(key for member in self.members for key in member.swept)
        return (*_ALWAYS, *(key for key in swept if key not in _ALWAYS))

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The tidy table.

        Columns: ``run``; one for each of `keys`; ``round`` (0: before any training); ``device``
        (empty: of all); ``source`` (``measured`` or ``modelled``); ``metric``; ``value``, in the
        unit that the metric's name ends with (none: nats, shares, counts).
        """
        columns = ["run", *self.keys, "round", "device", "source", "metric", "value"]
        rows = [row for member in self.members for row in self._rows(member)]
        frame = pd.DataFrame(rows, columns=columns)
        return frame.astype({"device": "Int64", "value": "float64"})

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """One row per run and round, in the order of the members: `keys`, a column per metric.

        Costs are those of the run up to then, peaks the largest up to then.
        """
        whole = self.frame[self.frame["device"].isna()]
        index = ["run", *self.keys, "round"]
        # Rows without a value of some key are rows all the same.
        wide = whole.pivot_table(index=index, columns="metric", values="value", dropna=False)
        order = {member.name: place for place, member in enumerate(self.members)}
        wide = wide.dropna(how="all").reset_index()
        wide["place"] = wide["run"].map(order)
        wide = wide.sort_values(["place", "round"], ignore_index=True).drop(columns="place")
        wide.columns.name = None
        by_run = wide.groupby("run", sort=False)
        for name in (name for name in COSTS if name in wide):
            wide[name] = wide[name].fillna(0.0)
            wide[name] = by_run[name].cumsum()
        for name in (name for name in PEAKS if name in wide):
            wide[name] = by_run[name].cummax()
        return wide

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `rounds` has a column of."""
        return tuple(name for name in self.rounds if name not in ("run", *self.keys))

    def key(self, name: str) -> str:
        """Return the key that `name` is the end of, as in ``bandwidth_hz``.

        Raises
        ------
        SettingsError
            If the study sweeps over nothing, or several things, of that name.
        """
        ends = [key for key in self.keys if key == name or key.endswith(f".{name}")]
        if len(ends) != 1:
            raise SettingsError("--by", name, f"one of {', '.join(self.keys)}")
        return ends[0]

    def metric(self, name: str) -> str:
        """Return `name`, if it is a metric of this study.

        Raises
        ------
        SettingsError
            If it is none.
        """
        if name not in self.metrics:
            raise SettingsError("metric", name, f"one of {', '.join(sorted(self.metrics))}")
        return name

    def config(self, member: MemberRecord) -> dict[str, Any]:
        """Return the configuration that a member was run with.

        Raises
        ------
        FedsplitError
            If it cannot be read.
        """
        path = self.folder / member.folder / CONFIG
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise FedsplitError(f"{path}: is not the configuration of a run ({error})") from error
        require(isinstance(read, dict), str(path), "", "a mapping of settings")
        return dict(read)

    def records(self, member: MemberRecord) -> list[RoundRecord]:
        """Return the rounds of a member; none if it came to none."""
        folder = self.folder / member.folder
        return read_records(folder) if (folder / RESULTS).is_file() else []

    def write(self) -> tuple[Path, ...]:
        """Write the table beside the runs, as parquet and CSV; return the paths."""
        parquet, text = paths = tuple(self.folder / name for name in TABLE)
        # Of one type each, as a column of parquet must be.
        mixed = {key: str for key in self.keys if self.frame[key].map(type).nunique() > 1}
        self.frame.astype(mixed).to_parquet(parquet, index=False)
        self.frame.to_csv(text, index=False)
        return paths

    def _rows(self, member: MemberRecord) -> Iterator[dict[str, Any]]:
        records = self.records(member)
        if not records:
            return
        config = self.config(member)
        own = {key: _at(config, _WHERE[key]) for key in _ALWAYS} | dict(member.swept)
        head = {"run": member.name, **own}
        for record in records:
            for device, source, metric, value in _values(record):
                yield {
                    **head,
                    "round": record.round,
                    "device": device,
                    "source": source,
                    "metric": metric,
                    "value": value,
                }
        folder = self.folder / member.folder
        for number, device, metric, value in (*_data(folder), *_turns(folder)):
            yield {
                **head,
                "round": number,
                "device": device,
                "source": MEASURED,
                "metric": metric,
                "value": value,
            }


_Value = tuple[int | None, str, str, float]


def _values(record: RoundRecord) -> Iterator[_Value]:
    for name, value in record.flat().items():
        if name != "round" and value is not None and not name.startswith("modelled."):
            yield None, MEASURED, name, float(value)
    modelled = dict(record.modelled or {})
    if modelled:
        ways = ("uplink_bytes", "downlink_bytes", "backhaul_bytes")
        modelled["traffic_bytes"] = sum(modelled.get(way, 0.0) for way in ways)
    for name, value in modelled.items():
        if isinstance(value, int | float):
            yield None, MODELLED, name, float(value)
    for device in record.participants:
        yield device, MEASURED, "took_part", 1.0
    for failure in record.failures:
        if failure.role == "device":
            yield failure.index, MEASURED, f"failed.{failure.phase}", 1.0


def _data(folder: Path) -> Iterator[tuple[int, int, str, float]]:
    """Return what each device holds, where the run wrote it down."""
    devices = json.loads((folder / RESULTS).read_text(encoding="utf-8")).get("data", {})
    for device, counts in devices.get("devices", {}).items():
        for name, value in counts.items():
            yield 0, int(device), f"data.{name}", float(value)


def _turns(folder: Path) -> Iterator[tuple[int, int, str, float]]:
    """Return what each device did in a round: sums over its turns; means of losses by target."""
    rows = pd.DataFrame([asdict(turn) for turn in read_turns(folder) if not turn.failure])
    if rows.empty:
        return
    for name in _MEANS:
        rows[name] = rows[name].astype(float) * rows["targets"]
    for (number, device, phase), part in rows.groupby(["round", "device", "phase"], sort=False):
        for name in part.select_dtypes("number").columns.difference(["round", "device"]):
            targets = part["targets"].where(part[name].notna()).sum() if name in _MEANS else 1
            value = part[name].max() if name == "peak_bytes" else part[name].sum(min_count=1)
            if targets and not math.isnan(value):
                yield number, device, f"{phase}.{name}", float(value / targets)


def _at(config: dict[str, Any], path: Sequence[str]) -> Any:
    value: Any = config
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value
