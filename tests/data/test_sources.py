"""Sources: files, data sets and the Python library turned to examples, or a clear refusal."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsplit.data import SOURCES, DataSpec
from fedsplit.data.examples import Pair, Picture, Text
from fedsplit.data.sources import read_corpus
from fedsplit.data.stdlib import THEMES, docstrings, topic_texts
from fedsplit.errors import FedsplitError

E2E = Path(__file__).parents[3] / "shared" / "data" / "e2e"


@pytest.fixture
def e2e_folder(tmp_path):
    rows = '"name[Aromi], food[Thai]",Aromi is Thai.\n"name[Zizzi], area[riverside]",Find Zizzi.\n'
    (tmp_path / "devset.csv").write_text("mr,ref\n" + rows)
    (tmp_path / "testset_w_refs.csv").write_text('"mr","ref"\n"name[Aromi], food[Thai]","Thai!"\n')
    return tmp_path


def test_stdlib_gives_each_theme_as_a_group_of_its_own():
    corpus = read_corpus(DataSpec())
    texts = [example.text for example in corpus.train]
    groups = np.bincount([example.group for example in corpus.train])
    assert len(groups) == len(THEMES) >= 4
    assert groups.min() >= 100
    assert len(set(texts)) > 0.9 * len(texts)


def test_what_is_fine_tuned_on_was_not_pretrained_on():
    seen = {line.strip() for text in docstrings() for line in text.splitlines() if len(line) > 60}
    topics = [
        line.strip() for texts in topic_texts().values() for t in texts for line in t.splitlines()
    ]
    long = [line for line in topics if len(line) > 60]
    assert len(seen) > 5_000
    assert sum(line in seen for line in long) < 0.005 * len(long)


def test_a_python_without_topics_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FedsplitError, match=r"lacks the module pydoc_data\.topics"):
        read_corpus(DataSpec())


def test_e2e_pairs_a_meaning_with_its_sentence(e2e_folder):
    corpus = read_corpus(DataSpec(source="e2e", path=str(e2e_folder)))
    assert corpus.train == [
        Pair("name[Aromi], food[Thai]", "Aromi is Thai.", 0),
        Pair("name[Zizzi], area[riverside]", "Find Zizzi.", 1),
    ]
    assert corpus.test == [Pair("name[Aromi], food[Thai]", "Thai!", 0)]


def test_e2e_prefers_the_training_file(e2e_folder):
    (e2e_folder / "trainset.csv").write_text("mr,ref\nname[Fitzbillies],A place.\n")
    corpus = read_corpus(DataSpec(source="e2e", path=str(e2e_folder)))
    assert [pair.target for pair in corpus.train] == ["A place."]


@pytest.mark.skipif(not E2E.is_dir(), reason=f"the E2E files are not in {E2E}")
def test_the_real_e2e_files_are_read_whole():
    corpus = read_corpus(DataSpec(source="e2e", path=str(E2E)))
    assert (len(corpus.train), len(corpus.test)) == (4_672, 4_693)


def test_text_reads_a_folder_with_a_group_per_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    (tmp_path / "c.csv").write_text('text,more\n"five, six",x\n')
    (tmp_path / "notes.md").write_text("not data")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("one\n\ntwo\n")
    (tmp_path / "d.txt").touch()
    corpus = read_corpus(DataSpec(source="text", path=str(tmp_path)))
    assert [item.removeprefix(f"{tmp_path}/") for item in corpus.left_out] == [
        ".ipynb_checkpoints/a-checkpoint.txt (hidden)",
        "d.txt (empty)",
        "notes.md (not .txt, .csv, .tsv, .json, .jsonl, .parquet)",
    ]
    assert corpus.train == [
        Text("one\n\n", 0, ends=False),
        Text("two\n\n", 0),
        Text("three", 1),
        Text("four", 1),
        Text("five, six", 2),
    ]


def test_text_reads_pairs_grouped_by_a_label(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"q": "1+1", "a": "2", "kind": "sum"}, {"q": "2*3", "a": "6", "kind": "product"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    corpus = read_corpus(
        DataSpec(
            source="text", path=str(file), prompt_column="q", target_column="a", label_column="kind"
        )
    )
    assert corpus.train == [Pair("1+1", "2", 1), Pair("2*3", "6", 0)]


def test_hub_reads_what_the_datasets_library_loads(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "c", "label": 0}\n')
    spec = DataSpec(source="hub", name=str(tmp_path), test_split="test", label_column="label")
    corpus = read_corpus(spec)
    assert corpus.train == [Text("a", 1), Text("b", 0)]
    assert corpus.test == [Text("c", 0)]


def test_hub_reads_images(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Pillow

    images = [Pillow.new("L", (4, 3), color=shade) for shade in (0, 200)]
    features = Features({"img": Image(), "kind": ClassLabel(names=["dark", "light"])})
    Dataset.from_dict({"img": images, "kind": [0, 1]}, features).to_parquet(
        str(tmp_path / "train.parquet")
    )
    spec = DataSpec(source="hub", name=str(tmp_path), image_column="img", label_column="kind")
    corpus = read_corpus(spec)
    assert corpus.n_labels == 2
    assert [picture.group for picture in corpus.train] == [0, 1]
    assert corpus.train[1].pixels.shape == (3, 3, 4)
    assert (corpus.train[1].pixels == 200).all()


def test_digits_are_ten_classes_of_grey_pictures():
    corpus = read_corpus(DataSpec(source="digits"))
    assert corpus.n_labels == 10
    assert len(corpus.train) == 1_797
    picture = corpus.train[0]
    assert isinstance(picture, Picture)
    assert picture.pixels.shape == (3, 8, 8)
    assert picture.pixels.max() > 200


def test_digits_without_scikit_learn_say_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(FedsplitError, match=r"pip install 'fedsplit\[digits\]'"):
        read_corpus(DataSpec(source="digits"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "imagenet"}, f"data.source='imagenet': must be one of {', '.join(SOURCES)}"),
        ({"source": "text"}, "data.path=None: must be given"),
        ({"source": "text", "path": "/nowhere"}, "data.path='/nowhere': must be an existing file"),
        ({"source": "hub"}, "data.name=None: must be given"),
        ({"source": "hub", "name": "/nowhere"}, "data.name='/nowhere'"),
    ],
)
def test_a_source_that_is_not_there_is_refused(fields, message):
    with pytest.raises(FedsplitError, match=message):
        read_corpus(DataSpec(**fields))


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("a.csv", "body\nx\n", {}, "no value in column 'text'; columns are body"),
        ("a.jsonl", '{"q": "x"}\n', {"prompt_column": "q", "target_column": "a"}, "column 'a'"),
        ("a.jsonl", "{oops\n", {}, "a.jsonl, line 1: not JSON"),
        ("a.pdf", "%PDF", {}, r"data\.path=.* must be \.txt, \.csv, .* or a folder"),
        ("a.txt", "\n\n", {}, "a.txt: has no examples"),
    ],
)
def test_a_file_that_cannot_be_read_as_asked_is_refused(tmp_path, name, content, fields, message):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(FedsplitError, match=message):
        read_corpus(DataSpec(source="text", path=str(file), **fields))


def test_an_e2e_folder_without_its_files_is_refused(tmp_path):
    with pytest.raises(FedsplitError, match=r"trainset\.csv or devset\.csv, and testset_w"):
        read_corpus(DataSpec(source="e2e", path=str(tmp_path)))
