"""A full disk: what is needed ends the run in one line, what is for the eye is left out.

A limit on the size of files stands for it: the system refuses every write, as it does there.
"""

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedsplit.errors import FedsplitError
from fedsplit.flower.server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedsplit.report import RoundRecord, RunReport, TurnRow, read_records
from fedsplit.report.files import spared
from fedsplit.report.run import METRICS, PLOT, RESULTS


@contextmanager
def full_disk() -> Iterator[None]:
    """Have the system refuse every byte that goes to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, usual)


def record(number: int) -> RoundRecord:
    return RoundRecord(round=number, train_loss=1.0, eval_loss=1.0, wall_s=1.0)


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint(number, {"a": torch.full((64,), float(number))}, {})


def test_results_keep_what_they_held_and_the_refusal_is_one_line(tmp_path: Path) -> None:
    report = RunReport(tmp_path, {}, 3)
    report.add_round(record(0))
    before = (tmp_path / RESULTS).read_text()
    for write in (
        lambda: report.add_round(record(1)),
        lambda: report.add_round(record(1), [TurnRow(round=1, phase="train", device=0)]),
        lambda: report.add_data(["a line"], {}),
    ):
        with full_disk(), pytest.raises(FedsplitError, match="cannot be written") as refusal:
            write()
        assert "\n" not in str(refusal.value)
        report._records = report._records[:1]
    assert (tmp_path / RESULTS).read_text() == before
    assert [kept.round for kept in read_records(tmp_path)] == [0]


def test_the_checkpoint_before_stays_whole(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    with full_disk(), pytest.raises(FedsplitError, match="checkpoint cannot be written"):
        save_checkpoint(tmp_path, checkpoint(2))
    assert load_checkpoint(tmp_path).server_round == 1
    save_checkpoint(tmp_path, checkpoint(2))
    assert load_checkpoint(tmp_path).server_round == 2


def _metrics(report: RunReport) -> None:
    (report.folder / METRICS).mkdir()


def _scalars(report: RunReport) -> None:
    def refused(record: RoundRecord) -> None:
        with full_disk(), (report.folder / "events").open("w") as file:
            file.write("no room")

    report._add_scalars = refused  # type: ignore[method-assign]


def _plot(report: RunReport) -> None:
    (report.folder / PLOT).mkdir()


@pytest.mark.parametrize("refuse", [_metrics, _scalars, _plot])
def test_a_file_for_the_eye_costs_nothing_but_itself(
    refuse: Callable[[RunReport], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = RunReport(tmp_path, {}, 1)
    (tmp_path / METRICS).unlink()
    refuse(report)
    report.add_round(record(0))
    report.finish()
    assert "summary" in json.loads((tmp_path / RESULTS).read_text())
    assert "is left out" in caplog.text


def test_a_log_on_the_same_disk_ends_nothing(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", buffering=1) as log:
        report = RunReport(tmp_path, {}, 1, Console(file=log))
        print = report._console.print

        def printed(*words: object, **how: object) -> None:
            with full_disk():
                print(*words, **how)  # type: ignore[arg-type]

        report._console.print = printed  # type: ignore[method-assign]
        report.add_round(record(0))


def test_only_what_the_disk_refuses_is_spared(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), spared(tmp_path / "x"):
        _ = 1 / 0
