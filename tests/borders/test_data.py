"""Files that users bring: each is read whole, or refused in one line that says which and where."""

import csv
import json
import socket
import tempfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fedsplit.assets import default_checkpoint
from fedsplit.data import DataSpec, describe, load_data
from fedsplit.data.sources import read_corpus
from fedsplit.errors import FedsplitError

CASES = Path(__file__).parents[3] / "shared" / "cases" / "data"

LINE = "The quick brown fox jumps over the lazy dog and returns a list of items. "
TWELVE = [{"text": f"{LINE * 3}{n}"} for n in range(12)]
PAIRS = {"prompt_column": "q", "target_column": "a"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(default_checkpoint())


@pytest.fixture(autouse=True)
def _no_connections(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"a connection is made: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def _lines(*rows: object, end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


def _csv(*rows: list[str], header: str = "text") -> str:
    return f"{header}\n" + "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows)


DOCUMENT = f"{LINE}\n\n" * 12
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}

# name, content (text is written as UTF-8), settings, number of examples
WORK = [
    ("plain.jsonl", _lines(*TWELVE), {}, 12),
    ("no_last_line_end.jsonl", _lines(*TWELVE).rstrip("\n"), {}, 12),
    ("bom.jsonl", "\ufeff" + _lines(*TWELVE), {}, 12),
    ("crlf.jsonl", _lines(*TWELVE, end="\r\n"), {}, 12),
    ("blank_lines.jsonl", _lines(*TWELVE, end="\n\n"), {}, 12),
    ("u2028.jsonl", _lines(*TWELVE, {"text": "line\u2028separator"}), {}, 13),
    ("u0085.jsonl", _lines(*TWELVE, {"text": "next\x85line"}), {}, 13),
    ("form_feed.jsonl", _lines(*TWELVE, {"text": "a\x1cb\x0b\x0cc"}), {}, 13),
    ("pretty.json", "\n" + json.dumps(TWELVE, indent=2), {}, 12),
    ("array.json", json.dumps(TWELVE), {}, 12),
    ("array_of_texts.json", json.dumps([row["text"] for row in TWELVE]), {}, 12),
    ("array_utf16.json", json.dumps(TWELVE).encode("utf-16"), {}, 12),
    ("lines_utf16.jsonl", _lines(*TWELVE).encode("utf-16"), {}, 12),
    ("CAPITALS.JSONL", _lines(*TWELVE), {}, 12),
    ("numbers.jsonl", _lines(*[{"text": 1, "x": None}, {"text": 2, "x": "y"}] * 6), {}, 12),
    ("more_columns_later.jsonl", _lines(*TWELVE, {"text": "a", "more": {"b": [1]}}), {}, 13),
    ("empty_text.jsonl", _lines(*TWELVE, {"text": ""}), {}, 13),
    (
        "like_a_log.jsonl",
        _lines(
            *(
                {**CHAT, **dict.fromkeys(("id", "source", "model", "system_prompt"), "x"), **row}
                for row in TWELVE
            )
        ),
        {},
        12,
    ),
    ("quotes.csv", _csv(*[[f'say ""hi"", {n}\n{LINE}'] for n in range(12)]), {}, 12),
    ("long_field.csv", _csv(["x" * 200_000], *[[LINE]] * 12), {}, 13),
    ("crlf.csv", _csv(*[[LINE]] * 12).replace("\n", "\r\n"), {}, 12),
    ("bom.csv", "\ufeff" + _csv(*[[LINE]] * 12), {}, 12),
    ("latin1.csv", _csv(*[["café"]] * 12).encode("latin-1"), {"encoding": "latin-1"}, 12),
    ("like_numbers.csv", _csv(["007"], ["1.0"], ["None"], ["NA"], *[[LINE]] * 8), {}, 12),
    ("tabs.tsv", "text\tlabel\n" + 'an odd " quote\t1\n' * 12, {"label_column": "label"}, 12),
    ("plain.txt", DOCUMENT, {}, 12),
    ("NOTES.TXT", DOCUMENT, {}, 12),
    ("bom.txt", "\ufeff" + DOCUMENT, {}, 12),
    ("crlf.txt", DOCUMENT.replace("\n", "\r\n"), {}, 12),
    ("utf16.txt", DOCUMENT.encode("utf-16"), {}, 12),
    ("utf32.txt", DOCUMENT.encode("utf-32"), {}, 12),
    ("latin1.txt", DOCUMENT.replace("fox", "é").encode("cp1252"), {"encoding": "cp1252"}, 12),
    ("u2028.txt", DOCUMENT.replace("fox", "\u2028\x85"), {}, 12),
    ("white_lines.txt", f"{LINE}\n \t\n" * 12, {}, 12),
    ("pairs.jsonl", _lines(*[{"q": LINE, "a": n} for n in range(12)]), PAIRS, 12),
    ("empty_answers.jsonl", _lines(*[{"q": LINE, "a": ""}] * 12), PAIRS, 12),
    ("chat.jsonl", _lines(*[CHAT] * 12), {"source": "chat", "template": "chatml"}, 12),
]

# name, content, settings, what the refusal says
REFUSED = [
    ("cut_short.jsonl", _lines(*TWELVE) + '{"text": "The qui', {}, ", line 13: not JSON: Untermin"),
    ("cut_short.json", json.dumps(TWELVE)[:-20], {}, ", line 1: not JSON: Unterminated string"),
    ("no_json.jsonl", "hello\n", {}, ", line 1: not JSON: Expecting value"),
    ("numbers.jsonl", "1\n2\n", {}, ", line 1: must be a JSON object"),
    ("string_later.jsonl", _lines(*TWELVE, "x"), {}, ", line 13: must be a JSON object"),
    ("twice.jsonl", '{"text": "a", "text": "b"}\n', {}, ", line 1: not JSON: the key 'text' is"),
    ("half.jsonl", '{"text": "a\\ud83d"}\n', {}, ", line 1: holds half a surrogate pair"),
    ("mixed_array.json", '[{"text": "a"}, 5]', {}, ", row 2: must be a JSON object"),
    ("row_without.json", json.dumps([*TWELVE, {"txt": "x"}]), {}, ", row 13: no value in column"),
    ("half.json", '[{"text": "a"}, {"text": "a\\ud83d"}]', {}, ", row 2: holds half a surrogate"),
    ("row_without.jsonl", _lines(*TWELVE, {"txt": "x"}), {},
        ", row 13: no value in column 'text'; columns are text, txt"),
    ("null.jsonl", _lines(*TWELVE, {"text": None}), {}, ", row 13: no value in column 'text'"),
    ("other_columns.jsonl", _lines({"a": 1, "b": 2}), {}, "'text'; columns are a, b"),
    ("nested.json", json.dumps({"data": TWELVE}), {}, "in column 'text'; columns are data"),
    ("messages.jsonl", _lines(CHAT), {"text_column": "messages"},
        ", row 1: column 'messages' holds lists, must be text or numbers; conversations are "
        "read by data=chat"),
    ("list_target.jsonl", _lines(*[{"q": "a", "a": ["b"]}] * 9), PAIRS, ", row 1: column 'a'"),
    ("object_later.jsonl", _lines(*TWELVE, {"text": {"b": 1}}), {},
        ", line 13: column 'text' holds objects, but text before"),
    ("number_later.jsonl", _lines(*TWELVE, {"text": 5}), {},
        ", line 13: column 'text' holds numbers, but text before"),
    ("text_later.json", json.dumps([{"text": 5}, {"text": None}, *TWELVE]), {},
        ", row 3: column 'text' holds text, but numbers before"),
    ("mixed_below.jsonl", _lines({"text": "a", "x": {"y": 1}}, {"text": "b", "x": {"y": "z"}}), {},
        ": cannot be read: JSON parse error: Column(/x/y) changed from number to string"),
    ("truth.jsonl", _lines({"text": True}), {}, "row 1: column 'text' holds true or false"),
    ("dates.jsonl", _lines({"text": "2020-01-01"}), {}, "row 1: column 'text' holds a datetime"),
    ("list_label.jsonl", _lines({"text": "a", "l": [1]}), {"label_column": "l"},
        ", row 1: column 'l' holds lists, must be a label: text or a number"),
    ("latin1.csv", _csv(["a"], ["café"]).encode("latin-1"), {},
        ", line 3: is not utf-8 text; say what it is, such as data.encoding=latin-1"),
    ("latin1.jsonl", _lines({"text": "a"}, {"text": "é"}).encode("latin-1"), {}, ", line 2: is"),
    ("latin1.txt", "a\n\ncafé\n".encode("latin-1"), {}, ", line 3: is not utf-8 text"),
    ("cut.txt", "café".encode()[:-1], {}, ", line 1: is not utf-8 text"),
    ("odd_utf16.txt", DOCUMENT.encode("utf-16") + b"x", {}, ": is not utf-16 text"),
    ("row_too_short.csv", _csv(*[["1", LINE]] * 12, ["13"], header="id,text"), {},
        ", row 13: no value in column 'text'; columns are id, text"),
    ("row_too_long.csv", _csv(["1", "a"], ["2", "b", "c"], header="id,text"), {},
        ": cannot be read: Error tokenizing data. C error: Expected 2 fields in line 3, saw 3"),
    ("all_too_long.csv", _csv(*[["1", "a", "b"]] * 9, header="id,text"), {},
        ": rows have more fields than the header"),
    ("open_quote.csv", 'text\n"a\nb\n', {}, "EOF inside string starting at row"),
    ("header_only.csv", "text\n", {}, ": has no examples"),
    ("empty_cell.csv", _csv(["a"], [""], header="text"), {}, ", row 2: no value in column 'text'"),
    ("no_parquet.parquet", "PAR1 and no more", {}, ": cannot be read: "),
    ("pointer.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", {},
        ": is a Git LFS pointer, not the data: git lfs pull"),
    ("pointer.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", {},
        ": is a Git LFS pointer"),
    ("empty.txt", "", {}, ": must be a file that is not empty"),
    ("white.txt", " \n\n \n", {}, ": has no examples"),
    ("paper.pdf", "%PDF", {}, ": must be .txt, .csv, .tsv, .json, .jsonl, .parquet or a folder"),
    ("one.jsonl", _lines({"text": "a"}), {}, "data.min_samples=2: must be at most 1, all the"),
    ("no_encoding.txt", "a", {"encoding": "utf-9"}, "data.encoding='utf-9': must be one that"),
    ("chat.txt", DOCUMENT, {"source": "chat"}, ": must be one of .csv, .tsv, .json, .jsonl"),
    ("no_chat.jsonl", _lines(*TWELVE), {"source": "chat"}, ", row 1: no conversation; columns"),
    ("no_role.jsonl", _lines({"messages": [{"from": "user", "value": "a"}]}), {"source": "chat"},
        ", row 1, message 1: 'role' must be text; its keys are from, value"),
    ("parts.jsonl", _lines({"messages": [{"role": "user", "content": [{"text": "a"}]}]}),
        {"source": "chat"}, ", row 1, message 1: 'content' must be text"),
    ("no_messages.jsonl", _lines({"messages": []}), {"source": "chat"},
        ", row 1: must be a list of messages"),
    ("weights.jsonl", _lines({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}),
        {"source": "chat"}, ", row 1, message 1: 'weight' is not obeyed"),
    ("all_prompt.jsonl", _lines(*[{"q": LINE * 9, "a": "b"}] * 9), {**PAIRS, "seq_len": 64},
        "that device 0 has to train on"),
]  # fmt: skip


def _write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def _load(path: Path, fields, tokenizer):
    """Load as ``data=text data.path=PATH fleet.devices=2`` does, down to the last sample."""
    spec = DataSpec(**{"source": "text", "path": str(path), **fields})
    return load_data(spec, tokenizer, n_devices=2, seed=0)


@pytest.mark.parametrize(("name", "content", "fields", "count"), WORK, ids=[c[0] for c in WORK])
def test_what_is_right_is_read_whole(tmp_path, tokenizer, name, content, fields, count):
    data = _load(_write(tmp_path, name, content), fields, tokenizer)
    counts = data.counts()
    assert sum(item.train.read + item.test.read for item in counts.values()) == count
    for device in range(2):
        samples = data.train(device)
        text = tokenizer.decode(samples.select(range(len(samples)))["input_ids"].flatten())
        assert "\ufeff" not in text


@pytest.mark.parametrize(
    ("name", "content", "fields", "says"), REFUSED, ids=[c[0] for c in REFUSED]
)
def test_what_is_not_is_refused_with_file_and_place(
    tmp_path, tokenizer, name, content, fields, says, capfd
):
    with pytest.raises(FedsplitError) as caught:
        _load(_write(tmp_path, name, content), fields, tokenizer).counts()
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    if not message.startswith(("fleet.", "data.encoding", "data.min_samples")):
        assert name in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".txt", ".parquet"])
def test_texts_come_as_they_stand_there(tmp_path, suffix):
    texts = [
        "007",
        "1.0",
        "None",
        "nan",
        "2020-01-01",
        'a "quoted", one',
        "é\u2028\U0001f600 x",
        "N/A",
    ]
    file = tmp_path / f"a{suffix}"
    if suffix == ".txt":
        file.write_text("\n\n".join(texts), encoding="utf-8")
    elif suffix == ".tsv":
        file.write_text("\n".join(["text", *texts]), encoding="utf-8")
    elif suffix == ".json":
        file.write_text(json.dumps([{"text": text} for text in texts]))
    elif suffix == ".csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([["text"], *([text] for text in texts)])
    elif suffix == ".jsonl":
        file.write_text(_lines(*({"text": text} for text in texts)), encoding="utf-8")
    else:
        from datasets import Dataset

        Dataset.from_dict({"text": texts}).to_parquet(str(file))
    corpus = read_corpus(DataSpec(source="text", path=str(file)))
    assert [example.text.removesuffix("\n\n") for example in corpus.train] == texts


@pytest.mark.parametrize(
    "name",
    ["with space", "o'brien (1) é=x", "a,b", "[x]", "{x}", "a*?b", "😀", "a::b", "x.txt", "-x",
     "%20", "$HOME", "#1", "a;b", "zip:b", "é" * 60],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".parquet"])
def test_any_name_will_do(tmp_path, monkeypatch, name, suffix):
    folder = tmp_path / name
    folder.mkdir()
    file = folder / f"{name}{suffix}"
    if suffix == ".parquet":
        from datasets import Dataset

        plain = tmp_path / "plain.parquet"
        Dataset.from_dict({"text": ["one", "two"]}).to_parquet(str(plain))
        file.write_bytes(plain.read_bytes())
    else:
        text = {".txt": "one\n\ntwo", ".csv": "text\none\ntwo\n"}
        file.write_text(text.get(suffix, _lines({"text": "one"}, {"text": "two"})))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (file, folder, Path(name), Path("~") / name):
        corpus = read_corpus(DataSpec(source="text", path=str(path)))
        assert [example.text.strip() for example in corpus.train] == ["one", "two"]


def test_reading_leaves_nothing_behind(tmp_path, monkeypatch):
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    folder = tmp_path / "data"
    folder.mkdir()
    _write(folder, "a.jsonl", _lines(*TWELVE))
    _write(folder, "b.csv", _csv([LINE]))
    _write(folder, "c.txt", DOCUMENT.encode("utf-16"))
    before = sorted(folder.iterdir())
    assert len(read_corpus(DataSpec(source="text", path=str(folder))).train) == 12 + 1 + 12
    read_corpus(DataSpec(source="hub", name=str(folder / "..") + "/data/", text_column="text"))
    assert sorted(folder.iterdir()) == before
    assert not list(home.iterdir())
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"path": "/nowhere/x.txt"}, "data.path='/nowhere/x.txt': must be an existing file"),
        ({"path": "x" * 5000}, "must be an existing file or folder"),
        ({"path": "\0"}, "must be an existing file or folder"),
        ({"path": ""}, "data.path='': must be given for source 'text'"),
        ({"source": "hub", "name": ""}, "data.name='': must be given"),
        ({"source": "junk"}, "data.source='junk': must be one of stdlib, e2e, text, chat"),
        ({"partition": "noniid"}, "data.partition='noniid': must be one of natural, iid"),
        ({"source": "stdlib", "partition": "local"}, "data.partition='local': must be another one"),
        ({"partition": {"_target_": "os.system"}}, "data.partition._target_='os.system': must be"),
        ({"partition": {}}, "data.partition._target_='None': must be flwr_datasets.partitioner."),
        ({"padding": "left"}, "data.padding='left': must be one of fixed, longest"),
        ({"encoding": "rot13"}, "data.encoding='rot13': must be one that Python has"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_right_are_refused(fields, says):
    with pytest.raises(FedsplitError) as caught:
        read_corpus(DataSpec(**{"source": "text", "path": ".", **fields}))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"train_split": "trian"}, "split 'trian': cannot be loaded: Unknown split"),
        ({"test_split": "dev"}, "split 'dev': cannot be loaded: Unknown split"),
        ({"text_column": "body"}, "row 1: no value in column 'body'; columns are text"),
        ({"subset": "large"}, "split 'train': cannot be loaded: BuilderConfig 'large' not found"),
    ],
)
def test_a_split_or_column_that_a_data_set_lacks_is_refused(tmp_path, fields, says):
    _write(tmp_path, "train.jsonl", _lines(*TWELVE))
    with pytest.raises(FedsplitError) as caught:
        read_corpus(DataSpec(source="hub", name=str(tmp_path), **fields))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_loss_of_examples_is_told_for_each_device(tmp_path, tokenizer):
    long, short = {"q": LINE * 9, "a": "yes"}, {"q": LINE, "a": "yes"}
    rows = [long, {**short, "a": "yes " * 60}, long, short] * 10
    data = _load(_write(tmp_path, "a.jsonl", _lines(*rows)), {**PAIRS, "seq_len": 64}, tokenizer)
    whole, *each = describe(data.counts(), 64, ["x.md (not .txt)"])
    left_out = "left out (empty, or no target within data.seq_len=64)"
    assert whole.startswith("data of 2 devices: 40 examples read; ")
    assert whole.endswith(f"; 10 cut to data.seq_len=64; 20 {left_out}")
    for device in range(2):
        assert each[device].startswith(f"device {device}: 20 examples read; ")
        assert each[device].endswith(f"; 5 cut to data.seq_len=64; 10 {left_out}")
    assert each[2:] == ["not read: x.md (not .txt)"]


@pytest.mark.parametrize("seed", range(8))
def test_a_device_tests_on_something_where_half_of_its_examples_cannot_be_learnt(
    tmp_path, tokenizer, seed
):
    rows = [{"q": LINE * 9, "a": "yes"}, {"q": LINE, "a": "yes"}] * 6
    file = _write(tmp_path, "a.jsonl", _lines(*rows))
    spec = DataSpec(source="text", path=str(file), seq_len=64, **PAIRS)
    for device in load_data(spec, tokenizer, 2, seed).counts().values():
        assert device.train.samples > 0
        assert device.test.samples > 0
        assert device.train.samples + device.test.samples == 3


def _expected() -> list[dict[str, str]]:
    if not CASES.is_dir():
        return []
    with (CASES / "expected.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the reported inputs are not in {CASES}")
@pytest.mark.parametrize("case", _expected(), ids=lambda case: case["file"])
def test_inputs_that_people_reported(case, tokenizer):
    file = CASES / case["file"].split("/")[0]
    settings = dict(item.split("=") for item in case["settings"].split())
    n_devices = int(settings.pop("fleet.devices", 2))
    fields = {
        key.removeprefix("data."): int(value) if value.isdigit() else value
        for key, value in settings.items()
    }
    spec = DataSpec(source="text", path=str(file), **fields)
    right = case["right"]
    try:
        counts = load_data(spec, tokenizer, n_devices, seed=0).counts()
    except FedsplitError as error:
        message = str(error)
        assert "refused" in right
        assert Path(case["file"]).name in message
        for part in ("line 13", "row 13", "encoding", "device 1", "column 'a'"):
            if right.startswith("refused") and part.replace("'", "") in right:
                assert part in message
        return
    assert "works" in right
    read = sum(item.train.read + item.test.read for item in counts.values())
    if right.endswith("texts"):
        assert right == f"works: {read} texts"
    if "20 of 40 were cut or left out" in right:
        lines = describe(counts, spec.seq_len)
        assert "40 examples read" in lines[0]
        assert "20 left out" in lines[0]
        assert [line[:9] for line in lines[1:]] == ["device 0:", "device 1:"]
