"""The folder of a run: results.json, metrics.csv, turns.csv, TensorBoard scalars, a plot."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from fedsplit.errors import FedsplitError, require
from fedsplit.plan import Failure
from fedsplit.report.files import csv_text, json_text, needed, spared, write_atomically
from fedsplit.report.plots import plot_loss
from fedsplit.report.records import RoundRecord
from fedsplit.report.tables import make_console, round_line, summary_table
from fedsplit.report.turns import TURNS, TurnRow, append_turns, cut_turns

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

RESULTS, METRICS, CONFIG, PLOT, SCALARS = (
    "results.json",
    "metrics.csv",
    "config.yaml",
    "loss.png",
    "tensorboard",
)


class RunReport:
    """Writes a run's results as they come, so that a run that is killed leaves whole files.

    Parameters
    ----------
    folder : Path
        Where to write; made if it does not exist.
    config : mapping
        The resolved configuration, kept as config.yaml.
    n_rounds : int
        Rounds that the run is to have, for the progress lines.
    console : rich.console.Console or None
        Where progress is printed; standard output by default, styled on a terminal only.

    Raises
    ------
    FedsplitError
        If `folder` holds results already; `resume` continues those.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        n_rounds: int,
        console: Console | None = None,
    ) -> None:
        if (folder / RESULTS).exists():
            raise FedsplitError(f"folder={str(folder)!r}: holds results already; resume it instead")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=False))
        self._start(folder, n_rounds, console, [])
        self._write(None)

    def _start(
        self, folder: Path, n_rounds: int, console: Console | None, records: list[RoundRecord]
    ) -> None:
        self.folder = folder
        self.n_rounds = n_rounds
        self._records = records
        self._failures: list[Failure] = []
        self._data: dict[str, Any] = {}
        self._console = console if console is not None else make_console()
        self._scalars: SummaryWriter | None = None

    @classmethod
    def resume(
        cls,
        folder: Path,
        last_round: int,
        n_rounds: int,
        console: Console | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> "RunReport":
        """Continue the report in `folder` after round `last_round`; later records are dropped.

        `config` takes the place of the configuration before, where some of it changed.

        Raises
        ------
        FedsplitError
            If `folder` holds no results, or they end before `last_round`.
        """
        records = read_records(folder)
        kept = [record for record in records if record.round <= last_round]
        reached = kept[-1].round if kept else 0
        require(reached == last_round, "last_round", last_round, f"at most {reached}")
        if config is not None:
            write_atomically(folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=False))
        cut_turns(folder, last_round)
        report = cls.__new__(cls)
        report._start(folder, n_rounds, console, kept)
        report._write(None)
        return report

    @property
    def records(self) -> tuple[RoundRecord, ...]:
        """Every round so far."""
        return tuple(self._records)

    def add_round(self, record: RoundRecord, turns: Sequence[TurnRow] = ()) -> None:
        """Keep a round, with what its turns did: update the files and print a line.

        Raises
        ------
        FedsplitError
            If the round does not follow the last one.
        """
        if self._records:
            due = self._records[-1].round + 1
            require(record.round == due, "record.round", record.round, f"{due}, the round due")
        # Turns first: of a round that is not in the results, a resumed run takes them away.
        with needed(self.folder / TURNS):
            append_turns(self.folder, turns)
        self._records.append(record)
        self._failures = []
        self._write(None)
        with spared(self.folder / SCALARS):
            self._add_scalars(record)
        with suppress(OSError):  # the console is a file in `fedsplit run`
            self._console.print(round_line(record, self.n_rounds), soft_wrap=True, highlight=True)

    def add_failure(self, failure: Failure) -> None:
        """Show a failure of the round under way, under `running` until the round is kept."""
        self._failures.append(failure)
        self._write(None)

    def add_data(
        self,
        lines: Sequence[str],
        devices: Mapping[str, Mapping[str, int]],
        left_out: Sequence[str] = (),
    ) -> None:
        """Keep what the devices' data are: `lines` to read, numbers by device, files not read."""
        self._data = {
            "lines": list(lines),
            "devices": dict(devices),
            "left_out": list(left_out),
        }
        self._write(None)

    def finish(self, summary: Mapping[str, Any] | None = None) -> None:
        """Close the report: `summary` into results.json, the plot, and the table on the console."""
        self._write(dict(summary or {}))
        with spared(self.folder / PLOT):
            plot_loss(self._records, self.folder / PLOT)
        if self._scalars is not None:
            with spared(self.folder / SCALARS):
                self._scalars.close()
        with suppress(OSError):
            self._console.print(summary_table(self._records, self.folder))

    def _write(self, summary: Mapping[str, Any] | None) -> None:
        results: dict[str, Any] = {"rounds": [record.to_json() for record in self._records]}
        if self._data:
            results["data"] = self._data
        if self._failures:
            results["running"] = {"failures": [asdict(failure) for failure in self._failures]}
        if summary is not None:
            results["summary"] = summary
        write_atomically(self.folder / RESULTS, json_text(results))
        rows = [record.flat() for record in self._records]
        with spared(self.folder / METRICS):
            write_atomically(self.folder / METRICS, csv_text(rows))

    def _add_scalars(self, record: RoundRecord) -> None:
        if self._scalars is None:
            from torch.utils.tensorboard import SummaryWriter

            # Of a resumed run, TensorBoard hides what was logged from this round on before.
            self._scalars = SummaryWriter(str(self.folder / SCALARS), purge_step=record.round)
        for name, value in record.flat().items():
            if name != "round" and isinstance(value, int | float):
                self._scalars.add_scalar(name.replace(".", "/"), value, record.round)
        self._scalars.flush()


def read_records(folder: Path) -> list[RoundRecord]:
    """Return the rounds in a run's results.json.

    Raises
    ------
    FedsplitError
        If there is no results.json in `folder`, or it is not one that `RunReport` wrote.
    """
    try:
        rounds = _results(folder)["rounds"]
        return [RoundRecord.from_json(values) for values in rounds]
    except (KeyError, TypeError, AttributeError) as error:
        raise _unreadable(folder, error) from error


def read_data_lines(folder: Path) -> list[str]:
    """Return what a run says of its devices' data, a line each; none before it knows.

    Raises
    ------
    FedsplitError
        As for `read_records`.
    """
    data = _results(folder).get("data", {})
    return [str(line) for line in data.get("lines", ())] if isinstance(data, dict) else []


def is_finished(folder: Path) -> bool:
    """Return whether the run in `folder` came to its end.

    Raises
    ------
    FedsplitError
        As for `read_records`.
    """
    return "summary" in _results(folder)


def read_stopped(folder: Path) -> str | None:
    """Return why the run in `folder` ended before its last round; None if it did not.

    Raises
    ------
    FedsplitError
        As for `read_records`.
    """
    summary = _results(folder).get("summary")
    stopped = summary.get("stopped") if isinstance(summary, dict) else None
    return None if stopped is None else str(stopped)


def _results(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FedsplitError(f"folder={str(folder)!r}: has no {RESULTS}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(folder, error) from error
    if not isinstance(results, dict):
        raise _unreadable(folder, f"a {type(results).__name__}")
    return results


def _unreadable(folder: Path, error: object) -> FedsplitError:
    return FedsplitError(f"{folder / RESULTS}: is not a results file ({error})")
