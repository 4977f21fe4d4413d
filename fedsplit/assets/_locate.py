"""Where the files that ship with the package lie."""

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from fedsplit.errors import FedsplitError

_NAME = "docstring-llama"
_WEIGHTS = "model.safetensors"
_CODECS = "sft_codecs.csv"


def default_checkpoint() -> Path:
    """Return the folder of the shipped checkpoint, for ``from_pretrained``.

    Flower sends an app's code to its nodes without large binary files, so that the package being
    imported may lack the weights; the installed distribution then has them.

    Raises
    ------
    FedsplitError
        If neither the imported nor the installed package holds the weights.
    """
    return _locate(
        Path(_NAME, _WEIGHTS), "or write it with `python -m fedsplit.assets.pretrain`"
    ).parent


def default_codec_table() -> Path:
    """Return the CSV file of codec settings measured on the shipped checkpoint.

    Written by ``python -m benchmarks.sft_codecs``: the default job at its cut, 60 mini-batches for
    each setting, one seed.

    Raises
    ------
    FedsplitError
        If neither the imported nor the installed package holds it.
    """
    return _locate(Path(_CODECS), "or name a table of your own")


def _locate(file: Path, otherwise: str) -> Path:
    """Return the path of an asset; if there is none, the error says what to do `otherwise`."""
    candidates = [folder / file for folder in (Path(__file__).parent, *_installed_copies())]
    for path in candidates:
        if path.is_file():
            return path
    tried = ", ".join(str(path.parent) for path in candidates)
    raise FedsplitError(f"the shipped {file} is in none of {tried}; install fedsplit, {otherwise}")


def _installed_copies() -> list[Path]:
    """Return the assets' folders in the installed distribution (wheel, editable)."""
    try:
        distribution = metadata.distribution("fedsplit")
    except metadata.PackageNotFoundError:
        return []
    inside = Path("fedsplit", "assets")
    folders = [Path(str(distribution.locate_file(inside)))]
    origin = distribution.read_text("direct_url.json")
    if origin is not None:
        url = urlparse(json.loads(origin)["url"])
        if url.scheme == "file":
            folders.append(Path(url2pathname(url.path)) / inside)
    return folders
