"""Calibration: real training with codecs at the cut, and the table that planning reads."""

from dataclasses import replace

import pytest
from fedsplit.apps.calibrate import (
    IDENTITY,
    CutTraining,
    Row,
    calibrate,
    fine_tune,
    measure,
    plot,
    write_table,
)
from rich.console import Console

from fedsplit.data import DataSpec
from fedsplit.errors import FedsplitError
from fedsplit.execution import OptimizerSpec
from fedsplit.models import ModelSpec
from fedsplit.planning.codec_table import CodecTable

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 10,
}
TRAINING = CutTraining(
    model=ModelSpec(
        model_type="vit",
        task="image-classification",
        config=TINY,
        target_modules="all-linear",
    ),
    data=DataSpec(source="digits", image_size=8, max_samples=64),
    optimizer=OptimizerSpec(lr=1e-2),
    cut=1,
    batch_size=16,
    steps=12,
    eval_samples=32,
)


@pytest.fixture(scope="module")
def uncompressed():
    pytest.importorskip("sklearn")
    return fine_tune(TRAINING, IDENTITY, IDENTITY, 0)


def test_without_compression_everything_is_sent_and_runs_repeat(uncompressed):
    assert (uncompressed.uplink, uncompressed.downlink, uncompressed.traffic) == (1, 1, 1)
    assert fine_tune(TRAINING, IDENTITY, IDENTITY, 0) == uncompressed
    assert fine_tune(TRAINING, IDENTITY, IDENTITY, 1).loss != uncompressed.loss


def test_harsh_compression_is_seen_in_bytes_and_loss(uncompressed):
    gentle = fine_tune(TRAINING, {"name": "bf16"}, {"name": "bf16"}, 0)
    harsh = fine_tune(TRAINING, {"name": "topk", "keep": 0.01, "bits": 2}, IDENTITY, 0)
    assert gentle.traffic == pytest.approx(0.5)
    assert abs(gentle.loss - uncompressed.loss) < abs(harsh.loss - uncompressed.loss)
    assert harsh.uplink < 0.03
    # A run evaluates through the codec, too: it pays in the test what it saves in bytes.
    assert harsh.coded_loss > harsh.loss
    assert uncompressed.coded_loss == uncompressed.loss
    assert harsh.downlink == 1


def test_ranks_and_frozen_blocks_are_measured_as_codecs_are(uncompressed):
    """The whole rank is the run without any; a frozen device is sent no gradient."""
    usual, rank = {0: uncompressed.loss}, TRAINING.model.r
    whole, half = (
        measure(TRAINING, {"name": "rank", "r": r}, "uplink", usual) for r in (rank, rank // 2)
    )
    assert (whole.ratio, whole.loss_increase) == (1, 0)
    assert half.ratio == 0.5
    assert half.loss_increase != 0
    frozen = TRAINING.changed_by({"name": "frozen", "cut": 2})
    still = fine_tune(frozen, IDENTITY, IDENTITY, 0)
    assert (frozen.cut, still.uplink, still.downlink) == (2, 1, 0)
    assert still.loss != uncompressed.loss
    # Where no block only infers, nothing is frozen: embeddings have no adapters.
    none = fine_tune(replace(frozen, cut=0), IDENTITY, IDENTITY, 0)
    assert none.loss == fine_tune(replace(TRAINING, cut=0), IDENTITY, IDENTITY, 0).loss


def test_the_table_is_what_planning_reads(tmp_path):
    rows = [
        Row(0.25, 0.001, {"name": "int8"}, 0.002, 2),
        Row(0.05, 0.02, {"name": "topk", "keep": 0.2, "bits": 4}, 0.03, 2),
    ]
    ways = [Row(0.5, 0.1, {"name": "rank", "r": 4}), Row(1, 0.2, {"name": "frozen", "cut": 2})]
    path = tmp_path / "deep" / "table.csv"
    write_table([*rows, *ways], path)
    plot([*rows, *ways], path.with_suffix(".png"))
    table = CodecTable.read_csv(path)
    assert table.ratio.tolist() == [0.25, 0.05]
    assert table.loss_increase.tolist() == [0.001, 0.02]
    assert table.itemsize == 2
    assert "coded_loss_increase" in path.read_text().splitlines()[0]
    assert (table.ranks, table.frozen) == ({4: 0.1}, {2: 0.2})
    assert table.envelope().at(4).ranks == table.ranks
    assert list(table.settings) == [row.settings for row in rows]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "wrong",
    [
        {"direction": "sideways"},
        {"steps": 0},
        {"seeds": 0},
        {"grid": ()},
        {"grid": [{"name": "x"}]},
    ],
)
def test_wrong_arguments_are_refused_before_training(wrong, tmp_path):
    with pytest.raises(FedsplitError):
        calibrate([], output=tmp_path / "table.csv", console=Console(quiet=True), **wrong)
    assert not list(tmp_path.iterdir())
