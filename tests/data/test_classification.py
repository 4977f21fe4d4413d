"""Texts to be classified: which class is which number, pairs, and what a tokenizer puts between."""

from pathlib import Path
from typing import Any

import pytest
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from fedsplit.data import DataSpec, load_data, load_device
from fedsplit.data.sources import read_corpus
from fedsplit.errors import FedsplitError, SettingsError


def spec_of(path: Path, **fields: Any) -> DataSpec:
    given = {"source": "text", "loss_on": "label", "label_column": "label", "seq_len": 16, **fields}
    return DataSpec(path=str(path), **given)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two columns of text and a label; the dev set has a class that training lacks."""
    rows = [("one", "eins", "yes"), ("two", "drei", "no"), ("five", "funf", "yes")]
    lines = ["text\tother\tlabel", *("\t".join(row) for row in rows)]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "dev.tsv").write_text('text\tother\tlabel\n"six\tsechs\tmaybe\n')
    return tmp_path


def test_classes_are_numbered_by_their_sorted_names_over_both_sets(table: Path) -> None:
    corpus = read_corpus(spec_of(table / "train.tsv", test_path=str(table / "dev.tsv")))
    assert [example.group for example in corpus.train] == [2, 1, 2]
    assert corpus.test is not None
    assert [(one.group, one.text) for one in corpus.test] == [(0, '"six')]  # type: ignore[union-attr]
    assert corpus.n_labels == 3
    named = read_corpus(spec_of(table / "train.tsv", labels=("yes", "no")))
    assert [example.group for example in named.train] == [0, 1, 0]
    assert named.n_labels == 2


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    file = tmp_path / "many.csv"
    file.write_text("text,label\n" + "".join(f"t{n},{n}\n" for n in (10, 9, 2, -1)))
    assert [one.group for one in read_corpus(spec_of(file)).train] == [3, 2, 1, 0]


def test_a_sample_is_a_text_with_its_class(table: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = load_data(spec_of(table, pair_column="other", min_samples=2), tokenizer, 1, 0)
    both = [data.train(0), data.test(0)]
    assert sum(map(len, both)) == 4
    batch = both[0].select(range(len(both[0])))
    assert batch["labels"].shape == batch["input_ids"].shape[:1]
    texts = [
        tokenizer.decode(row[mask.bool()])
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert all(text.count("\n") == 1 for text in texts)


def test_a_tokenizer_s_own_tokens_stand_between_the_texts_of_a_pair(table: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "eins", "two", "drei", "five", "funf"]
    bert = BertTokenizerFast(vocab={word: place for place, word in enumerate(words)})
    spec = spec_of(table / "train.tsv", pair_column="other", padding="longest")
    samples = load_data(spec, bert, 1, 0).train(0)
    batch = samples.select(range(len(samples)))
    assert batch["input_ids"].shape[1] == 8
    assert set(batch["input_ids"][:, 0].tolist()) == {2}
    assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


def test_devices_with_data_of_their_own_agree_on_the_classes(
    table: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    fields = {"partition": "local", "labels": ("no", "yes")}
    spec = spec_of(table / "train.tsv", **fields)
    mine = load_device(spec, tokenizer, device=0, n_devices=2, seed=0, path=table / "train.tsv")
    found = mine.train.select([0])["labels"].tolist() + mine.test.select([0])["labels"].tolist()
    assert set(found) <= {0, 1}
    with pytest.raises(FedsplitError, match="dev.tsv, row 1: label 'maybe' must be one of no, yes"):
        load_device(spec, tokenizer, device=1, n_devices=2, seed=0, path=table / "dev.tsv")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_column": None}, "data.label_column=None: must be given"),
        ({"source": "e2e"}, "data.loss_on='label': must be target or all"),
        ({"labels": ("a", "a")}, "must be null, or at least two different names"),
        ({"partition": "local"}, "data.labels=None: must be given with data.partition=local"),
        ({"loss_on": "all", "pair_column": "b"}, "data.pair_column='b': must be null without"),
        (
            {"partition": "local", "labels": ("a", "b"), "test_path": "x"},
            "data.test_path='x': must be null: only shared text",
        ),
    ],
)
def test_wrong_settings(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        spec_of(tmp_path, **fields)


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\na,1\nb,1\n")
    with pytest.raises(SettingsError, match="a column with at least two labels"):
        read_corpus(spec_of(tmp_path / "x.csv"))
