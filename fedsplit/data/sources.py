"""Where examples come from: one function per source, by the name that `DataSpec.source` gives."""

import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from fedsplit.data import stdlib
from fedsplit.data.examples import Corpus, Example, Pair, Picture, paragraphs
from fedsplit.data.files import TABLES, find_files, is_table, read_document, read_table
from fedsplit.data.rows import Table, class_names, examples_of
from fedsplit.data.spec import LABEL, DataSpec
from fedsplit.errors import FedsplitError, require

_E2E_TRAIN = ("trainset.csv", "devset.csv")
_E2E_TEST = "testset_w_refs.csv"
_E2E_PAIRS = DataSpec(prompt_column="mr", target_column="ref")
_E2E_NAME = re.compile(r"name\[(.*?)\]")


def read_corpus(spec: DataSpec) -> Corpus:
    """Return all examples of the source that `spec` names.

    Raises
    ------
    FedsplitError
        If its path or a column is missing, a file cannot be read, or it has no examples.
    """
    corpus = _READERS[spec.source](spec)
    if not corpus.train:
        where = spec.path or spec.name or spec.source
        raise FedsplitError(f"{where}: has no examples: no text, or no rows below the header")
    return corpus


def _stdlib(spec: DataSpec) -> Corpus:
    """Read chapters of the Python language reference; a group is a theme, such as statements."""
    return Corpus(
        [
            paragraph
            for group, texts in enumerate(stdlib.topic_texts().values())
            for text in texts
            for paragraph in paragraphs(text, group)
        ]
    )


def _text(spec: DataSpec) -> Corpus:
    """Read texts or pairs from a file or a folder of files; a group is a file or a label."""
    documents, tables, left_out = _read_files(_existing(spec), spec)
    test_documents: list[Example] = []
    test_tables: list[Table] = []
    if spec.test_path is not None:
        there = _existing(replace(spec, path=spec.test_path), "data.test_path")
        test_documents, test_tables, _ = _read_files(there, spec)
    names = None
    if spec.loss_on == LABEL:
        names = class_names([*tables, *test_tables], spec)
        spec = replace(spec, labels=names)
    train = documents + examples_of(tables, spec)
    test = test_documents + examples_of(test_tables, spec)
    kinds = {type(example) for example in train + test}
    require(len(kinds) <= 1, "data.path", spec.path, "texts only or pairs only")
    return Corpus(
        train,
        None if spec.test_path is None else test,
        n_labels=None if names is None else len(names),
        left_out=tuple(left_out),
    )


def _read_files(path: Path, spec: DataSpec) -> tuple[list[Example], list[Table], list[str]]:
    """Return the paragraphs and the tables of the files at `path`, and what was left out."""
    files, left_out = find_files(path)
    documents: list[Example] = []
    tables: list[Table] = []
    for origin, file in enumerate(files):
        if is_table(file):
            tables.append(Table(str(file), read_table(file, spec.encoding), origin))
        else:
            documents += paragraphs(read_document(file, spec.encoding), origin, str(file))
    return documents, tables, left_out


def _chat(spec: DataSpec) -> Corpus:
    """Read conversations from a table or a folder of tables; a group is a file or a label."""
    files, left_out = find_files(_existing(spec))
    for file in files:
        require(is_table(file), "data.path", str(file), f"one of {', '.join(TABLES)}")
    tables = [
        Table(str(file), read_table(file, spec.encoding), origin)
        for origin, file in enumerate(files)
    ]
    return Corpus(examples_of(tables, spec), left_out=tuple(left_out))


def _e2e(spec: DataSpec) -> Corpus:
    """Read the E2E NLG challenge's files from a folder; a group is the name of a venue.

    Trains on trainset.csv, or on devset.csv where that is absent; tests on testset_w_refs.csv.
    Source: Novikova, Dusek and Rieser, "The E2E dataset: new challenges for end-to-end
    generation", SIGDIAL 2017.
    """
    folder = _existing(spec)
    train = next((folder / name for name in _E2E_TRAIN if (folder / name).is_file()), None)
    if train is None or not (folder / _E2E_TEST).is_file():
        raise FedsplitError(
            f"data.path={spec.path!r}: must be a folder with {' or '.join(_E2E_TRAIN)}, "
            f"and {_E2E_TEST}"
        )
    files = [train, folder / _E2E_TEST]
    pairs = [
        examples_of([Table(str(file), read_table(file, spec.encoding))], _E2E_PAIRS)
        for file in files
    ]
    venues = sorted({_venue(pair) for part in pairs for pair in part})
    codes = {venue: code for code, venue in enumerate(venues)}
    train_pairs, test_pairs = (
        [replace(pair, group=codes[_venue(pair)]) for pair in part] for part in pairs
    )
    return Corpus(train_pairs, test_pairs)


def _venue(pair: Example) -> str:
    """Return the name in a meaning representation."""
    found = _E2E_NAME.search(cast("Pair", pair).prompt)
    return found[1] if found else ""


def _hub(spec: DataSpec) -> Corpus:
    """Read texts, pairs or images with the `datasets` library; a group is a label, if named."""
    train = _load(spec, spec.train_split)
    test = [] if spec.test_split is None else [_load(spec, spec.test_split)]
    names = class_names([train, *test], spec) if spec.loss_on == LABEL else None
    examples = examples_of([train, *test], replace(spec, labels=names))
    n_labels = None if names is None else len(names)
    return Corpus(
        examples[: len(train.rows)],
        examples[len(train.rows) :] or None,
        n_labels=n_labels if spec.image_column is None else _n_labels(examples),
    )


def _load(spec: DataSpec, split: str) -> Table:
    """Load a split of a data set: from a local folder without a trace, else through its cache."""
    import datasets

    folder = Path(str(spec.name)).expanduser()
    where = f"data.name={spec.name!r}, split {split!r}"
    with tempfile.TemporaryDirectory(prefix="fedsplit-data-") as cache:
        name, options = str(spec.name), {}
        if folder.is_dir():
            name, options = str(folder), {"cache_dir": cache, "keep_in_memory": True}
        try:
            rows = list(datasets.load_dataset(name, spec.subset, split=split, **options))
        except Exception as error:  # of the library, and of all that it reads by
            told = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise FedsplitError(f"{where}: cannot be loaded: {told}") from error
    return Table(where, rows)


def _digits(spec: DataSpec) -> Corpus:
    """Read scikit-learn's 1,797 handwritten digits, grey 8 x 8 pixels; a group is a digit."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FedsplitError(
            "data.source='digits' needs scikit-learn: pip install 'fedsplit[digits]'"
        ) from error
    images, labels = load_digits(return_X_y=True)
    grey = np.round(images.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey, 3, axis=1)
    examples = [Picture(image, int(label)) for image, label in zip(pixels, labels, strict=True)]
    return Corpus(examples, n_labels=_n_labels(examples))


def _n_labels(examples: list[Picture] | list[Example]) -> int:
    """Return the number of classes of `examples`, which count from 0."""
    least = min(example.group for example in examples)
    require(least >= 0, "data.label_column", least, "classes that count from 0")
    return 1 + max(example.group for example in examples)


def _existing(spec: DataSpec, field: str = "data.path") -> Path:
    """Return `spec.path`, which must be given and exist."""
    require(spec.path is not None, field, spec.path, f"given for source {spec.source!r}")
    path = Path(str(spec.path)).expanduser()
    try:
        there = path.exists()
    except OSError:  # too long a name, or a folder that may not be looked into
        there = False
    require(there, field, spec.path, "an existing file or folder")
    return path


_READERS: dict[str, Callable[[DataSpec], Corpus]] = {
    "stdlib": _stdlib,
    "e2e": _e2e,
    "text": _text,
    "chat": _chat,
    "hub": _hub,
    "digits": _digits,
}
