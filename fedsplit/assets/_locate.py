"""Where the shipped checkpoint lies."""

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from fedsplit.errors import FedsplitError

_NAME = "docstring-llama"
_WEIGHTS = "model.safetensors"


def default_checkpoint() -> Path:
    """Return the folder of the shipped checkpoint, for ``from_pretrained``.

    Flower sends an app's code to its nodes without large binary files, so that the package being
    imported may lack the weights; the installed distribution then has them.

    Raises
    ------
    FedsplitError
        If neither the imported nor the installed package holds the weights.
    """
    candidates = [Path(__file__).parent / _NAME, *_installed_copies()]
    for folder in candidates:
        if (folder / _WEIGHTS).is_file():
            return folder
    tried = ", ".join(str(folder) for folder in candidates)
    raise FedsplitError(
        f"the shipped checkpoint {_NAME} is in none of {tried}; "
        "install fedsplit, or write it with `python -m fedsplit.assets.pretrain`"
    )


def _installed_copies() -> list[Path]:
    """Return where the installed distribution would keep the checkpoint (wheel, editable)."""
    try:
        distribution = metadata.distribution("fedsplit")
    except metadata.PackageNotFoundError:
        return []
    inside = Path("fedsplit", "assets", _NAME)
    folders = [Path(str(distribution.locate_file(inside)))]
    origin = distribution.read_text("direct_url.json")
    if origin is not None:
        url = urlparse(json.loads(origin)["url"])
        if url.scheme == "file":
            folders.append(Path(url2pathname(url.path)) / inside)
    return folders
