"""A test set of the server's own, and tests on some samples only."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedsplit.data import DataSpec, RowSamples, draw, load_test
from fedsplit.errors import FedsplitError
from fedsplit.models import read_tokenizer


def rows(count: int) -> RowSamples:
    return RowSamples([{"input_ids": torch.tensor([index])} for index in range(count)])


def test_samples_are_drawn_without_replacement_in_their_order() -> None:
    drawn = draw(rows(20), 6, np.random.default_rng(0))
    found = [int(value) for value in drawn.select(range(6))["input_ids"]]
    assert len(drawn) == 6
    assert found == sorted(set(found))
    again = draw(rows(20), 6, np.random.default_rng(0))
    assert torch.equal(again.select(range(6))["input_ids"], drawn.select(range(6))["input_ids"])
    assert int(drawn.select([2])["input_ids"]) == found[2]


@pytest.mark.parametrize("count", [None, 20, 21])
def test_no_fewer_than_there_are(count: int | None) -> None:
    samples = rows(20)
    assert draw(samples, count, np.random.default_rng(0)) is samples


def test_all_of_it_is_tested_on(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """No device's path, no share of it held out."""
    file = tmp_path / "test.csv"
    file.write_text("q,a\n" + "".join(f"what is {n},it is {n}\n" for n in range(9)))
    spec = DataSpec(
        source="text", path="elsewhere", prompt_column="q", target_column="a", seq_len=32
    )
    assert len(load_test(spec, read_tokenizer(str(tiny_checkpoint)), file)) == 9


def test_of_a_source_with_a_test_set_that_alone(tmp_path: Path, tiny_checkpoint: Path) -> None:
    for name, count in (("devset.csv", 7), ("testset_w_refs.csv", 3)):
        lines = (f"name[A{n}],it is {n}" for n in range(count))
        (tmp_path / name).write_text("\n".join(["mr,ref", *lines, ""]))
    spec = DataSpec(source="e2e", path="elsewhere", seq_len=32)
    assert len(load_test(spec, read_tokenizer(str(tiny_checkpoint)), tmp_path)) == 3


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (DataSpec(source="stdlib"), "data.source='stdlib': must be one of"),
        (
            DataSpec(source="text", path="x", label_column="y", loss_on="label"),
            "data.labels=None: must be given",
        ),
    ],
)
def test_what_could_be_another_test_is_refused(spec: DataSpec, complaint: str) -> None:
    with pytest.raises(FedsplitError, match=complaint):
        load_test(spec, None, "x")
