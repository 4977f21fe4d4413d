"""A run's folder: whole after every round, continued after a stop, summed up at the end."""

import csv
import io
import json

import pytest
import yaml
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedsplit.errors import FedsplitError
from fedsplit.plan import Failure
from fedsplit.report import RoundRecord, RunReport, read_records
from fedsplit.report.files import json_text


def _record(number: int) -> RoundRecord:
    return RoundRecord(
        number,
        train_loss=3.0 / (number + 1),
        eval_loss=4.0 / (number + 1),
        perplexity=2.5,
        bytes_up={"device": 2_000_000},
        bytes_down={"device": 1_000_000},
        wall_s=0.5,
        participants=(0, 1),
        modelled={"delay_s": 12.5},
    )


@pytest.fixture
def log():
    return Console(file=io.StringIO(), width=160)


def _report(folder, log, n_rounds=3):
    return RunReport(folder, {"seed": 1, "model": {"source": "gpt2"}}, n_rounds, log)


def test_the_folder_is_whole_after_every_round(tmp_path, log):
    folder = tmp_path / "outputs" / "run"
    report = _report(folder, log)
    assert json.loads((folder / "results.json").read_text()) == {"rounds": []}
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"] == {"source": "gpt2"}
    for number in range(3):
        report.add_round(_record(number))
        assert read_records(folder) == [_record(i) for i in range(number + 1)]
        with (folder / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["eval_loss"] for row in rows] == [str(4.0 / (i + 1)) for i in range(number + 1)]
        assert rows[-1]["modelled.delay_s"] == "12.5"
    assert {path.name for path in folder.iterdir()} == {
        "results.json",
        "metrics.csv",
        "config.yaml",
        "tensorboard",
    }


def test_columns_that_appear_later_are_empty_before(tmp_path, log):
    report = _report(tmp_path, log)
    report.add_round(RoundRecord(0, eval_loss=4.0))
    report.add_round(_record(1))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["bytes_up.device"] for row in rows] == ["", "2000000"]


def test_scalars_are_what_tensorboard_reads(tmp_path, log):
    report = _report(tmp_path, log)
    for number in range(3):
        report.add_round(_record(number))
    report.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("eval_loss")]
    assert scalars == [(i, pytest.approx(4.0 / (i + 1))) for i in range(3)]
    assert [event.value for event in events.Scalars("bytes_up/device")] == [2_000_000] * 3
    assert [event.value for event in events.Scalars("modelled/delay_s")] == [12.5] * 3


def test_a_resumed_report_equals_one_that_was_never_stopped(tmp_path, log):
    whole = _report(tmp_path / "whole", log)
    stopped = _report(tmp_path / "stopped", log)
    for number in range(3):
        whole.add_round(_record(number))
    for number in range(2):
        stopped.add_round(_record(number))
    resumed = RunReport.resume(tmp_path / "stopped", last_round=0, n_rounds=3, console=log)
    assert resumed.records == (_record(0),)
    for number in (1, 2):
        resumed.add_round(_record(number))
    for report in (whole, resumed):
        report.finish({"adapter": "adapter"})
    for name in ("results.json", "metrics.csv"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "whole" / name).read_text()
    events = EventAccumulator(str(tmp_path / "stopped" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("eval_loss")] == [0, 1, 2]


def test_the_end_draws_the_losses_and_names_the_folder(tmp_path, log):
    report = _report(tmp_path, log)
    for number in range(3):
        report.add_round(_record(number))
    report.finish({"strategy": "splitfed"})
    assert json.loads((tmp_path / "results.json").read_text())["summary"] == {
        "strategy": "splitfed"
    }
    image = Image.open(tmp_path / "loss.png")
    assert min(image.size) > 300
    assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    printed = log.file.getvalue()
    assert str(tmp_path) in printed
    assert "modelled delay s" in printed


def test_a_run_without_any_round_ends_well(tmp_path, log):
    _report(tmp_path, log).finish()
    assert (tmp_path / "loss.png").exists()
    assert str(tmp_path) in log.file.getvalue()


def test_a_log_gets_one_plain_line_per_round(tmp_path):
    log = Console(file=io.StringIO(), width=40)
    report = _report(tmp_path, log)
    report.add_round(_record(0))
    report.add_round(
        RoundRecord(1, accuracy=0.5, failures=(Failure("device", 2, "train", "gone"),))
    )
    assert log.file.getvalue().splitlines() == [
        "round 0/3  train 3.0000  eval 4.0000  perplexity 2.50  up 2.00 MB down 1.00 MB  0.5 s",
        "round 1/3  accuracy 50.0%  0.0 s  failed: device 2",
    ]


def test_a_failure_shows_at_once_and_stays_with_its_round(tmp_path, log):
    def shown() -> dict[str, object]:
        return json.loads((tmp_path / "results.json").read_text())

    report = _report(tmp_path, log)
    report.add_round(_record(0))
    lost = Failure("edge", 1, "train", "cut off", 12.5), Failure("device", 3, "train", "edge 1")
    for failure in lost:
        report.add_failure(failure)
    assert [item["role"] for item in shown()["running"]["failures"]] == ["edge", "device"]
    assert shown()["running"]["failures"][0] == {
        "role": "edge",
        "index": 1,
        "phase": "train",
        "reason": "cut off",
        "unix_s": 12.5,
    }
    assert len(read_records(tmp_path)) == 1, "the round under way is none yet"
    report.add_round(RoundRecord(1, failures=lost))
    assert "running" not in shown()
    assert read_records(tmp_path)[1].failures == lost


def test_of_a_long_run_the_table_shows_the_first_and_the_last_rounds(tmp_path, log):
    report = _report(tmp_path, log, n_rounds=40)
    for number in range(41):
        report.add_round(_record(number))
    log.file.truncate(0)
    report.finish()
    cells = [line.split()[1] for line in log.file.getvalue().splitlines() if line.startswith("│")]
    assert cells == ["0", "1", "2", "...", *map(str, range(32, 41))]


def test_results_are_never_overwritten_and_rounds_never_skipped(tmp_path, log):
    report = _report(tmp_path, log)
    report.add_round(_record(0))
    with pytest.raises(FedsplitError, match="holds results already"):
        _report(tmp_path, log)
    with pytest.raises(FedsplitError, match=r"record\.round=2: must be 1"):
        report.add_round(_record(2))


def test_what_cannot_be_resumed_is_refused(tmp_path, log):
    with pytest.raises(FedsplitError, match=r"has no results\.json"):
        RunReport.resume(tmp_path, 1, 3, log)
    _report(tmp_path, log).add_round(_record(0))
    with pytest.raises(FedsplitError, match="last_round=5: must be at most 0"):
        RunReport.resume(tmp_path, 5, 9, log)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(FedsplitError, match="is not a results file"):
        read_records(tmp_path)


def test_what_is_put_together_from_rounds_is_the_same_text(tmp_path, log):
    """A round is turned into text once, however many follow."""
    report = _report(tmp_path, log)
    seen = [(tmp_path / "results.json").read_text()]
    report.add_data(["a line\nand another"], {"0": {"n-train": 3}, "1": {}})
    for number in range(3):
        report.add_failure(Failure("device", 1, "train", 'it said "no"', 1.0))
        seen.append((tmp_path / "results.json").read_text())
        report.add_round(_record(number))
        seen.append((tmp_path / "results.json").read_text())
    report.finish({"best": {"round": 2}})
    seen.append((tmp_path / "results.json").read_text())
    assert all(text == json_text(json.loads(text)) for text in seen)
