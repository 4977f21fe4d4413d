"""Measured tables are read, cleaned to the settings worth using, and refused when malformed."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.planning.codec_table import CodecTable

_ROWS = st.lists(
    st.tuples(st.floats(0.01, 2.0), st.floats(-0.1, 1.0)), min_size=1, max_size=12
)  # fmt: skip


def _table(rows: list[tuple[float, float]]) -> CodecTable:
    ratio, loss = np.array(rows).T
    return CodecTable(ratio, loss, tuple({"name": "topk", "row": i} for i in range(len(rows))))


@given(_ROWS)
def test_the_envelope_keeps_exactly_the_settings_that_nothing_beats(rows) -> None:
    table = _table(rows)
    kept = table.envelope()
    assert (np.diff(kept.ratio) > 0).all()
    assert (np.diff(kept.loss_increase) < 0).all()
    for ratio, loss in rows:
        assert ((kept.ratio <= ratio) & (kept.loss_increase <= loss)).any()
    for ratio, loss, setting in zip(kept.ratio, kept.loss_increase, kept.settings, strict=True):
        assert rows[setting["row"]] == (ratio, loss)


@given(_ROWS)
def test_the_hull_is_convex_and_below_the_envelope(rows) -> None:
    envelope, hull = _table(rows).envelope(), _table(rows).hull()
    slopes = np.diff(hull.loss_increase) / np.diff(hull.ratio)
    assert (np.diff(slopes) >= -1e-9 * np.abs(slopes[1:])).all()
    below = np.interp(envelope.ratio, hull.ratio, hull.loss_increase)
    assert (below <= envelope.loss_increase + 1e-9).all()


def test_a_written_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(
        'ratio,loss_increase,name,settings\n0.064,0.01,topk,"{""keep"": 0.1, ""bits"": 4}"\n'
        "1.0,0.0,identity,{}\n"
    )
    table = CodecTable.read_csv(path)
    assert table.ratio.tolist() == [0.064, 1.0]
    assert table.settings == ({"name": "topk", "keep": 0.1, "bits": 4}, {"name": "identity"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio,name\n1,a\n", r"line 2.*loss_increase"),
        ("ratio,loss_increase,name,settings\nx,0,a,{}\n", r"line 2.*'x'"),
        ("ratio,loss_increase,name,settings\n1,0,a,{\n", r"line 2"),
        ("ratio,loss_increase,name,settings\n", "rows of a codec table=0: must be at least 1"),
        ("ratio,loss_increase,name,settings\n0,0,a,{}\n", r"ratio\[0\]"),
        ("ratio,loss_increase,name,settings,itemsize\n1,0,a,{},4\n1,0,a,{},2\n", "itemsize"),
        ("ratio,loss_increase,name,settings,itemsize\n1,0,a,{},0\n", "itemsize"),
        ("ratio,loss_increase,name,settings\n1,nan,a,{}\n", "loss_increase"),
    ],
)
def test_a_malformed_table_is_refused_with_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(FedsplitError, match=message):
        CodecTable.read_csv(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FedsplitError, match=r"none\.csv"):
        CodecTable.read_csv(tmp_path / "none.csv")
