"""The files of a checkpoint: found, whole, and open; nothing is said of what they hold."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fedsplit.errors import FedsplitError
from fedsplit.models.private import checkpoint_files

PLAIN = (
    "fedsplit reads plain float32, float16 and bfloat16 weights: name the checkpoint that this one "
    "was quantised from, or dequantise it first"
)
_LFS = b"version https://git-lfs"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, as its header describes it: safetensors' type, shape."""

    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The open safetensors files of a model; a context manager.

    Parameters
    ----------
    source : str
        Hub name or local folder.

    Raises
    ------
    FedsplitError
        If a file is missing, is none of safetensors', is cut off, or was not fetched by Git LFS.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._files = contextlib.ExitStack()
        self._slices: dict[str, Any] = {}
        try:
            for path in _files(source):
                self._open(path)
        except BaseException:
            self._files.close()
            raise

    def _open(self, path: Path) -> None:
        try:
            file = self._files.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.source, path, error) from error
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name in self._slices:
                raise wrong(self.source, f"{name!r} is in more than one of its files")
            self._slices[name] = file.get_slice(name)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def slices(self) -> Mapping[str, Any]:
        """The stored tensors by name; nothing is read before a slice of one is taken."""
        return self._slices

    def headers(self) -> dict[str, Stored]:
        """Return the type and shape of every stored tensor."""
        return {
            name: Stored(item.get_dtype(), tuple(item.get_shape()))
            for name, item in self._slices.items()
        }


def _files(source: str) -> list[Path]:
    """Return the safetensors files of `source`.

    Raises
    ------
    FedsplitError
        If it has none, or its index names one that is not there.
    """
    folder = Path(source)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if folder.is_dir() and not (folder / SAFE_WEIGHTS_NAME).is_file() and index.is_file():
        try:
            shards = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(source, index, error) from error
        outside = {name for name in shards if Path(name).name != name}
        if outside:
            raise wrong(source, f"{index.name} names files outside its folder: {few(outside)}")
        absent = {name for name in shards if not (folder / name).is_file()}
        if absent:
            raise wrong(
                source,
                f"{len(absent)} of the {len(shards)} files that {index.name} names are missing: "
                f"{few(absent)}",
            )
        return [folder / name for name in sorted(shards)]
    try:
        return [Path(name) for name in checkpoint_files(source)]
    except (OSError, ValueError) as error:
        others = sorted(
            path.name
            for path in (folder.iterdir() if folder.is_dir() else ())
            if path.suffix in _OTHER_FORMATS
        )
        if others:
            cause = (
                f"it holds {few(others)}, which cannot be read segment by segment (and a pickle "
                "may run code); save it again with `save_pretrained` first"
            )
        else:
            cause = str(error)
        raise FedsplitError(
            f"source={source!r}: must be a checkpoint in safetensors format: {one_line(cause)}"
        ) from error


def _unreadable(source: str, path: Path, error: Exception) -> FedsplitError:
    """Return the error for a file that is not what its name says."""
    if is_lfs_pointer(path):
        return wrong(
            source, f"{path.name} is a Git LFS pointer, not the file: fetch it (git lfs pull)"
        )
    if isinstance(error, OSError):
        return wrong(source, f"{path.name} cannot be read ({one_line(str(error))})")
    size = path.stat().st_size
    return wrong(
        source,
        f"{path.name} ({size} bytes) is cut off or damaged: copy it again ({one_line(str(error))})",
    )


def is_lfs_pointer(path: Path) -> bool:
    """Return whether Git LFS left a note in the place of the file."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS
    return False


def wrong(source: str | None, what: str) -> FedsplitError:
    """Return the error that says `what` is wrong with a checkpoint."""
    return FedsplitError(f"source={source!r}: {what}")


def few(names: Iterable[str], most: int = 3) -> str:
    """Return the first few of `names`, with nothing in them that a terminal would obey."""
    listed = sorted(names)
    shown = ", ".join(one_line(name)[:120] for name in listed[:most])
    return shown + (", ..." if len(listed) > most else "")


def one_line(text: str) -> str:
    """Return `text` in one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
