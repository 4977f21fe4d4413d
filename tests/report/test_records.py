"""Records of rounds: they come back from JSON as they went, and become rows of a table."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.plan import Failure
from fedsplit.report import RoundRecord

losses = st.none() | st.floats(-1e6, 1e6)
byte_counts = st.dictionaries(st.sampled_from(["device", "edge"]), st.integers(0, 2**50))
records = st.builds(
    RoundRecord,
    round=st.integers(0, 1000),
    train_loss=losses,
    eval_loss=losses,
    perplexity=losses,
    accuracy=st.none() | st.floats(0, 1),
    bytes_up=byte_counts,
    bytes_down=byte_counts,
    wall_s=st.floats(0, 1e6),
    participants=st.lists(st.integers(0, 9)).map(tuple),
    failures=st.lists(
        st.builds(
            Failure,
            st.sampled_from(["device", "edge"]),
            st.integers(0, 9),
            st.sampled_from(["train", "evaluate"]),
            st.text(),
        )
    ).map(tuple),
    modelled=st.none() | st.dictionaries(st.text(min_size=1), st.floats(0, 1e9)),
)


@settings(max_examples=50, deadline=None)
@given(record=records)
def test_a_record_comes_back_from_json_as_it_went(record):
    assert RoundRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_what_is_not_finite_is_null_so_that_any_json_reader_takes_it():
    record = RoundRecord(1, train_loss=float("nan"), modelled={"delay_s": float("inf")})
    text = json.dumps(record.to_json(), allow_nan=False)
    assert json.loads(text)["train_loss"] is None
    assert json.loads(text)["modelled"] == {"delay_s": None}


def test_a_row_keeps_measured_and_modelled_columns_apart():
    record = RoundRecord(
        2,
        wall_s=1.5,
        bytes_up={"device": 10, "edge": 4},
        participants=(0, 3),
        failures=(Failure("device", 1, "train", "link closed"),),
        modelled={"delay_s": 9.0, "energy": {"device_j": 2.0}, "per_device": [1, 2]},
    )
    row = record.flat()
    assert row["wall_s"] == 1.5
    assert row["bytes_up.device"] == 10
    assert row["bytes_up.edge"] == 4
    assert row["participants"] == 2
    assert row["failures"] == 1
    assert row["modelled.delay_s"] == 9.0
    assert row["modelled.energy.device_j"] == 2.0
    assert "modelled.per_device" not in row


def test_a_file_of_another_kind_is_refused():
    with pytest.raises(FedsplitError, match=r"results.json: record.lost.*: round, train_loss"):
        RoundRecord.from_json({"round": 1, "lost": 2.0})
