"""The table of a study: tidy, whole, and the same as the runs' own files."""

from pathlib import Path

import pandas as pd
import pytest

from fedsplit.errors import FedsplitError, SettingsError
from fedsplit.report.studies.frame import Study
from fedsplit.report.studies.members import DONE, MemberRecord, read_members, write_members


def test_a_row_per_run_round_device_and_metric(study: Study) -> None:
    frame = study.frame
    columns = ["run", "strategy", "seed", "round", "device", "source", "metric", "value"]
    assert frame.columns.tolist() == columns
    assert not frame.duplicated(columns[:-1]).any()
    one = frame[(frame["run"] == "strategy=slow seed=1") & (frame["round"] == 2)]
    whole = one[one["device"].isna()].set_index("metric")
    assert whole.loc["eval_loss", ["value", "source"]].tolist() == [3.1, "measured"]
    assert whole.loc["delay_s", ["value", "source"]].tolist() == [4.1, "modelled"]
    assert whole.loc["traffic_bytes", "value"] == 3e6
    assert whole.loc["bytes_up.device", "value"] == 2000
    took = one[one["metric"] == "took_part"]["device"].tolist()
    assert took == [0, 1]
    assert one[one["metric"] == "failed.train"]["device"].tolist() == [2]
    assert frame[frame["metric"] == "data.train-samples"]["value"].unique().tolist() == [7]


def test_costs_add_up_over_rounds_and_peaks_stay(study: Study) -> None:
    rounds = study.rounds
    one = rounds[rounds["run"] == "strategy=quick seed=2"]
    assert one["delay_s"].tolist() == pytest.approx([0.0, 1.2, 2.4])
    assert one["traffic_bytes"].tolist() == [0.0, 3e6, 6e6]
    assert one["device_peak_bytes"].tolist()[1:] == [5e6 - 1, 5e6 - 1]
    assert one["eval_loss"].tolist() == [4.2, 4.0, 3.8]
    assert rounds["run"].drop_duplicates().tolist() == [m.name for m in study.members[:-1]]


def test_the_files_hold_the_table(study: Study) -> None:
    parquet, text = study.write()
    same = study.frame.reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), same, check_dtype=False)
    assert pd.read_csv(text)["value"].tolist() == pytest.approx(same["value"].tolist())


def test_a_run_is_a_study_of_one(study: Study) -> None:
    alone = Study.open(study.folder / study.members[0].folder)
    assert alone.rounds["eval_loss"].tolist() == [4.0, 3.5, 3.0]
    assert alone.keys == ("strategy", "seed")


def test_what_is_no_study_is_refused(tmp_path: Path, study: Study) -> None:
    with pytest.raises(SettingsError, match="must be the folder of a study or of a run"):
        Study.open(tmp_path / "nowhere")
    for call, words in ((study.metric, "one of .*delay_s"), (study.key, "one of strategy, seed")):
        with pytest.raises(SettingsError, match=words):
            call("nonsense")


@pytest.mark.parametrize("text", ["{", "[]", '{"members": 3}', '{"members": [{"name": 1}]}'])
def test_a_broken_record_of_a_study_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(FedsplitError):
        read_members(tmp_path)


def test_members_stay_in_their_study(tmp_path: Path) -> None:
    with pytest.raises(FedsplitError, match="folder='../x': must be a folder's name"):
        MemberRecord(name="x", folder="../x", swept={}, status=DONE)
    member = MemberRecord(name="x", folder="x", swept={"a": 1.5, "b": "c"}, status=DONE)
    write_members(tmp_path, [member])
    assert read_members(tmp_path) == [member]
