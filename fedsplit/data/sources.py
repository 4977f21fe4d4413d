"""Where examples come from: one function per source, by the name that `DataSpec.source` gives."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedsplit.data import stdlib
from fedsplit.data.examples import Corpus, Example, Pair, Picture, Text, paragraphs
from fedsplit.data.rows import TABLES, Row, examples_of, read_table, require_columns
from fedsplit.data.spec import DataSpec
from fedsplit.errors import FedsplitError, require, require_choice

_E2E_TRAIN = ("trainset.csv", "devset.csv")
_E2E_TEST = "testset_w_refs.csv"
_E2E_NAME = re.compile(r"name\[(.*?)\]")


def read_corpus(spec: DataSpec) -> Corpus:
    """Return all examples of the source that `spec` names.

    Raises
    ------
    FedsplitError
        If the source is unknown, its path or a column is missing, or it has no examples.
    """
    require_choice("data.source", spec.source, SOURCES)
    corpus = SOURCES[spec.source](spec)
    require(len(corpus.train) > 0, "data.source", spec.source, "one that has examples")
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
    """Read a .txt, .jsonl or .csv file or a folder of them; a group is a file or a label."""
    path = _existing(spec)
    suffixes = (".txt", *TABLES)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix in suffixes]
    require(len(files) > 0, "data.path", spec.path, f"{', '.join(suffixes)} or a folder with such")
    examples: list[Example] = []
    rows: list[Row] = []
    origins: list[int] = []
    for origin, file in enumerate(files):
        if file.suffix in TABLES:
            table = read_table(file)
            rows += table
            origins += [origin] * len(table)
        else:
            examples += paragraphs(file.read_text(encoding="utf-8"), origin)
    examples += examples_of(rows, spec, origins)
    require(
        len({isinstance(example, Text) for example in examples}) <= 1,
        "data.path",
        spec.path,
        "texts only or pairs only",
    )
    return Corpus(examples)


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
    tables = [read_table(train), read_table(folder / _E2E_TEST)]
    venues = sorted({_venue(row) for table in tables for row in table})
    codes = {venue: code for code, venue in enumerate(venues)}
    train_pairs, test_pairs = (
        [Pair(row["mr"], row["ref"], codes[_venue(row)]) for row in table] for table in tables
    )
    return Corpus(train_pairs, test_pairs)


def _venue(row: Row) -> str:
    """Return the name in a meaning representation."""
    require_columns(row, ("mr", "ref"), "data.source='e2e'")
    found = _E2E_NAME.search(row["mr"])
    return found[1] if found else ""


def _hub(spec: DataSpec) -> Corpus:
    """Read texts, pairs or images with the `datasets` library; a group is a label, if named."""
    try:
        import datasets
    except ImportError as error:
        raise FedsplitError(
            "data.source='hub' needs the datasets library: pip install 'fedsplit[hub]'"
        ) from error
    require(spec.name is not None, "data.name", spec.name, "given for source 'hub'")

    def load(split: str) -> list[Row]:
        try:
            return list(datasets.load_dataset(spec.name, spec.subset, split=split))
        except (OSError, ValueError) as error:
            raise FedsplitError(
                f"data.name={spec.name!r}, split {split!r}: cannot be loaded: {error}"
            ) from error

    train = load(spec.train_split)
    test = [] if spec.test_split is None else load(spec.test_split)
    examples = examples_of(train + test, spec, [0] * (len(train) + len(test)))
    return Corpus(
        examples[: len(train)],
        examples[len(train) :] or None,
        n_labels=None if spec.image_column is None else _n_labels(examples),
    )


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
    return 1 + max(example.group for example in examples)


def _existing(spec: DataSpec) -> Path:
    """Return `spec.path`, which must be given and exist."""
    require(spec.path is not None, "data.path", spec.path, f"given for source {spec.source!r}")
    path = Path(str(spec.path)).expanduser()
    require(path.exists(), "data.path", spec.path, "an existing file or folder")
    return path


SOURCES: dict[str, Callable[[DataSpec], Corpus]] = {
    "stdlib": _stdlib,
    "e2e": _e2e,
    "text": _text,
    "hub": _hub,
    "digits": _digits,
}
