"""Files that users bring, read by the `datasets` library: which they are, and what is in them.

The library gets each file under a plain name in a folder of its own that is gone afterwards: so no
character of a path is taken for a pattern, and nothing gathers in the user's cache. It makes no
connection. What it cannot read is refused with the file and, where that can be found, the row.
"""

import codecs
import csv
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from fedsplit.errors import FedsplitError, require

Row = Mapping[str, Any]

DOCUMENTS = (".txt",)
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")

_BINARY = (".parquet",)
_JSON = (".json", ".jsonl")
_MARKS = {  # UTF-32 before UTF-16, whose mark it begins with
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_POINTER = b"version https://git-lfs.github.com/spec/"
_CHUNK_BYTES = 1 << 20


def find_files(path: Path) -> tuple[list[Path], list[str]]:
    """Return the data files at `path` in order, and what else is there with why it is left out.

    Hidden files and folders (``.ipynb_checkpoints`` holds copies of what lies beside it) are no
    data, and neither are files of other kinds or without content.

    Raises
    ------
    FedsplitError
        If there is no data file, or `path` is one that is empty.
    """
    kinds = ", ".join(DOCUMENTS + TABLES)
    if not path.is_dir():
        known = path.suffix.lower() in DOCUMENTS + TABLES
        require(known, "data.path", str(path), f"{kinds} or a folder with such")
        require(path.stat().st_size > 0, "data.path", str(path), "a file that is not empty")
        return [path], []
    found: list[Path] = []
    left_out: list[str] = []
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        if not file.is_file():
            continue
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            left_out.append(f"{file} (hidden)")
        elif file.suffix.lower() not in DOCUMENTS + TABLES:
            left_out.append(f"{file} (not {kinds})")
        elif file.stat().st_size == 0:
            left_out.append(f"{file} (empty)")
        else:
            found.append(file)
    require(len(found) > 0, "data.path", str(path), f"{kinds} or a folder with such, not empty")
    return found, left_out


def is_table(file: Path) -> bool:
    """Return whether `file` holds rows, rather than one text."""
    return file.suffix.lower() in TABLES


def read_document(file: Path, encoding: str = "utf-8") -> str:
    """Return the text of `file`; a byte-order mark tells the encoding, whatever `encoding` says.

    Raises
    ------
    FedsplitError
        If the file cannot be read or decoded.
    """
    from datasets.io.text import TextDatasetReader

    with _in_its_own_folder(file, encoding) as (plain, options):
        reader = TextDatasetReader(str(plain), sample_by="document", **options)
        return "".join(row["text"] for row in reader.read())


def read_table(file: Path, encoding: str = "utf-8") -> list[Row]:
    """Return the rows of `file`: values by column, None where there is none.

    All values of a .csv or .tsv file are strings, just as they stand there; an empty cell is None.

    Raises
    ------
    FedsplitError
        If the file cannot be read or decoded; names it, and the row where that is known.
    """
    suffix = file.suffix.lower()
    with _in_its_own_folder(file, encoding) as (plain, options):
        return list(_READERS[suffix](plain, options).read())


def _json_reader(plain: Path, options: dict[str, Any]) -> Any:
    from datasets.io.json import JsonDatasetReader
    from datasets.packaged_modules.json.json import JsonConfig

    # Left to itself it turns texts that look like numbers into numbers, where others are numbers.
    options = {**options, "on_mixed_types": None}
    # Newer versions take a file with certain columns for the log of a coding agent.
    if hasattr(JsonConfig, "parse_agent_traces"):
        options = {**options, "parse_agent_traces": False}
    # In one piece: the columns of a piece are those of its first rows.
    return JsonDatasetReader(str(plain), chunksize=plain.stat().st_size + 1, **options)


def _csv_reader(plain: Path, options: dict[str, Any]) -> Any:
    import pandas
    from datasets import Features, Value
    from datasets.io.csv import CsvDatasetReader

    layout: dict[str, Any] = {"sep": ","}
    if plain.suffix == ".tsv":
        layout = {"sep": "\t", "quoting": csv.QUOTE_NONE}
    columns = pandas.read_csv(plain, nrows=0, index_col=False, **layout).columns
    return CsvDatasetReader(
        str(plain),
        features=Features({str(name): Value("string") for name in columns}),
        keep_default_na=False,  # "None" and "NA" are text
        na_values=[""],
        index_col=False,
        **layout,
        **options,
    )


def _parquet_reader(plain: Path, options: dict[str, Any]) -> Any:
    from datasets.io.parquet import ParquetDatasetReader

    return ParquetDatasetReader(str(plain), **options)


_READERS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    ".csv": _csv_reader,
    ".tsv": _csv_reader,
    ".json": _json_reader,
    ".jsonl": _json_reader,
    ".parquet": _parquet_reader,
}


@contextmanager
def _in_its_own_folder(file: Path, encoding: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give `file`, as UTF-8 and by a plain name, and the options of a reader that leaves no trace.

    Whatever goes wrong with the file meanwhile is told as a `FedsplitError` that names it.
    """
    from datasets.utils import logging

    suffix = file.suffix.lower()
    before = logging.get_verbosity()
    with tempfile.TemporaryDirectory(prefix="fedsplit-data-") as folder:
        plain = Path(folder) / f"data{suffix}"
        unit = "line"
        try:
            _refuse_pointers(file)
            if suffix in _BINARY:
                plain.symlink_to(file.resolve())
            else:
                unit = _as_utf8(file, plain, encoding)
            logging.set_verbosity(logging.CRITICAL)  # it logs what it raises
            with warnings.catch_warnings():
                warnings.simplefilter("error", category=_parser_warning())
                yield plain, {"cache_dir": os.path.join(folder, "cache"), "streaming": True}
        except FedsplitError:
            raise
        except Exception as error:
            raise FedsplitError(f"{file}{_why(plain, error, unit)}") from error
        finally:
            logging.set_verbosity(before)


def _parser_warning() -> type[Warning]:
    from pandas.errors import ParserWarning

    return cast("type[Warning]", ParserWarning)


def _refuse_pointers(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise FedsplitError(f"{file}: is a Git LFS pointer, not the data: git lfs pull")


def _as_utf8(file: Path, plain: Path, encoding: str) -> str:
    """Make `plain` a link to `file` if that is UTF-8 without a mark, else a UTF-8 copy.

    A JSON array becomes an object per line: not every version knows one that begins with a space.
    Returns what a line of `plain` is in `file`: a "line", or a "row" of an array.
    """
    with file.open("rb") as stream:
        start = stream.read(4)
    found = next((name for mark, name in _MARKS.items() if start.startswith(mark)), encoding)
    try:
        first = next(filter(str.strip, _decoded(file, found)), "").lstrip()[:1]
        if plain.suffix in _JSON and first == "[":
            text = "".join(_decoded(file, found))
            plain.write_text("".join(_lines_of_array(text, file)), encoding="utf-8")
            return "row"
        if codecs.lookup(found).name == "utf-8":
            for _ in _decoded(file, found):
                pass
            plain.symlink_to(file.resolve())
        else:
            with plain.open("w", encoding="utf-8", newline="") as copy:
                copy.writelines(_decoded(file, found))
    except UnicodeDecodeError as error:
        line = _line_of_error(file, found)
        raise FedsplitError(
            f"{file}, line {line}: is not {found} text; say what it is, such as "
            "data.encoding=latin-1 or data.encoding=cp1252"
        ) from error
    return "line"


def _lines_of_array(text: str, file: Path) -> Iterator[str]:
    """Yield the objects of a JSON array, a line each; a bare text is a column of that name."""
    try:
        items = json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise FedsplitError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from error
    except ValueError as error:
        raise FedsplitError(f"{file}: not JSON: {error}") from error
    for number, item in enumerate(items, start=1):
        row = {"text": item} if isinstance(item, str) else item
        if not isinstance(row, dict):
            raise FedsplitError(f"{file}, row {number}: must be a JSON object")
        yield json.dumps(row) + "\n"


def _decoded(file: Path, encoding: str) -> Iterator[str]:
    with file.open(encoding=encoding, newline="") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def _line_of_error(file: Path, encoding: str) -> int:
    """Return the line, from 1, at which decoding `file` fails."""
    decoder = codecs.getincrementaldecoder(encoding)()
    lines = 1
    with file.open("rb") as stream:
        try:
            for line in stream:
                lines += decoder.decode(line).count("\n")
        except UnicodeError:
            pass
    return lines


def _why(plain: Path, error: Exception, unit: str) -> str:
    """Return what is wrong with a file that `error` came of, and where: at which `unit`."""
    if plain.suffix in _JSON and plain.exists():
        found = _bad_json(plain.read_text(encoding="utf-8"))
        if found:
            return f", {unit} {found}"
    if isinstance(error, _parser_warning()):
        return ": rows have more fields than the header"
    told = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f": cannot be read: {told}".replace(str(plain), plain.name)


def _bad_json(text: str) -> str | None:
    """Return the number of the first line of a text that is no JSON, and why; None without one."""
    kinds: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_without_repeats)
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeError:
                return f"{number}: holds half a surrogate pair, which is no character"
            except ValueError as error:
                return f"{number}: not JSON: {error}"
            if not isinstance(row, dict):
                return f"{number}: must be a JSON object"
            for column, value in row.items():
                kind = _kind_of(value)
                before = kinds.setdefault(column, kind) or kind
                if kind and kind != before:
                    return f"{number}: column {column!r} holds {kind}, but {before} before"
                kinds[column] = before
    return None


def _kind_of(value: Any) -> str:
    """Return what JSON calls `value`; nothing for null, which any column may hold."""
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "numbers", float: "numbers", list: "lists", dict: "objects"}
    return names.get(type(value), "")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return dict(pairs)
