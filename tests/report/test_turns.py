"""turns.csv: appended, read back as written, cut where a run goes on."""

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.report import RoundRecord, RunReport, TurnRow, read_turns
from fedsplit.report.turns import append_turns, cut_turns

counts = st.integers(0, 2**50)
seconds = st.floats(0, 1e6)
words = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=8)
rows = st.builds(
    TurnRow,
    round=st.integers(0, 99),
    phase=st.sampled_from(["train", "evaluate"]),
    device=st.integers(0, 999),
    site=words,
    route=st.sampled_from(["", "device[0:2] -> server[2:8]"]),
    targets=counts,
    loss=st.none() | st.floats(0, 1e9),
    accuracy=st.none() | st.floats(0, 1),
    bytes_up=counts,
    compute_s=seconds,
    peak_bytes=counts,
    failure=words,
)


def turn(server_round: int, device: int = 0, **fields) -> TurnRow:
    return TurnRow(round=server_round, phase="train", device=device, **fields)


@settings(max_examples=30, deadline=None)
@given(written=st.lists(rows, max_size=5))
def test_rows_come_back_as_they_went(written, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    append_turns(folder, written)
    assert read_turns(folder) == written


def test_a_round_appends_and_rewrites_nothing(tmp_path):
    append_turns(tmp_path, [turn(1, 0), turn(1, 1)])
    before = (tmp_path / "turns.csv").stat().st_ino, (tmp_path / "turns.csv").read_bytes()
    append_turns(tmp_path, [turn(2)])
    after = (tmp_path / "turns.csv").stat().st_ino, (tmp_path / "turns.csv").read_bytes()
    assert after[0] == before[0]
    assert after[1].startswith(before[1])
    assert after[1].count(b"round,phase") == 1


@pytest.mark.parametrize("left", ["", "2,train,0", "2,train,0,site,device[0:1],3,"])
def test_a_resumed_run_keeps_the_rounds_that_it_goes_on_from(tmp_path, left):
    """Whatever a kill left of the last line."""
    report = RunReport(tmp_path, {}, 3)
    for number in range(3):
        report.add_round(RoundRecord(number), [turn(number, 0), turn(number, 1)])
    with (tmp_path / "turns.csv").open("a") as file:
        file.write(left)
    RunReport.resume(tmp_path, 1, 3).add_round(RoundRecord(2), [turn(2, 7)])
    found = [(row.round, row.device) for row in read_turns(tmp_path)]
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 7)]


def test_a_reason_of_many_lines_is_one_row(tmp_path):
    append_turns(tmp_path, [turn(1, failure="gone:\nno, answer\r\nin time")])
    assert len((tmp_path / "turns.csv").read_text().splitlines()) == 2
    assert read_turns(tmp_path)[0].failure == "gone: no, answer in time"


def test_any_reader_of_csv_takes_it(tmp_path):
    append_turns(tmp_path, [turn(1, loss=2.5, site="St. Mary's, ward 3")])
    with (tmp_path / "turns.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["site"], row["loss"], row["accuracy"]) == ("St. Mary's, ward 3", "2.5", "")


def test_what_is_no_table_of_turns_is_refused(tmp_path):
    cut_turns(tmp_path, 3)
    assert read_turns(tmp_path) == []
    (tmp_path / "turns.csv").write_text("round,phase\n1,train\n")
    with pytest.raises(FedsplitError, match="is not a table of turns"):
        read_turns(tmp_path)
