"""What was found out about an architecture before, kept on disk.

Where a model can be cut, and what it costs, takes seconds to find out and depends on nothing but
its configuration, what of it is trained, the libraries' versions and this package's source. All of
them are in an entry's key, so that another version never reads it. An entry that is not what was
written, a folder that cannot be read or written, or none at all only cost the time again.
"""

import hashlib
import json
import os
import platform
import tempfile
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "transformers", "peft")
_PACKAGE = Path(__file__).parents[1]
_SOURCES = ("models", "plan.py", "profiles.py", "layergraph.py")
FOLDER = "FEDSPLIT_CACHE"
"""Environment variable that names the folder; empty: nothing is kept."""


def cache_folder() -> Path | None:
    """Return where entries are kept: `FOLDER`, else ``fedsplit`` in the user's cache folder.

    Returns
    -------
    Path or None
        None if `FOLDER` is empty, or there is neither XDG_CACHE_HOME nor a home.
    """
    named = os.environ.get(FOLDER)
    if named is not None:
        return Path(named) if named else None
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        base = caches if caches.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "fedsplit"


def recall(kind: str, key: str) -> Any:
    """Return what `remember` was given for `key`, or None.

    Parameters
    ----------
    kind : str
        What is known: part of the file's name.
    key : str
        All that the value depends on, beside versions and source.
    """
    path = _path(kind, key)
    if path is None:
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    # The key stands in the file too: a name alone may be another entry's.
    if not (isinstance(entry, dict) and entry.get("key") == _full(kind, key)):
        return None
    return entry.get("value")


def remember(kind: str, key: str, value: Any) -> None:
    """Keep `value`, which JSON must be able to hold, for `key`; at once or not at all."""
    path = _path(kind, key)
    if path is None:
        return
    text = json.dumps({"key": _full(kind, key), "value": value})
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{kind}-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise


def _path(kind: str, key: str) -> Path | None:
    folder = cache_folder()
    digest = hashlib.sha256(_full(kind, key).encode()).hexdigest()[:32]
    return None if folder is None else folder / f"{kind}-{digest}.json"


def _full(kind: str, key: str) -> str:
    return json.dumps([kind, key, _environment()])


@cache
def _environment() -> str:
    """Return the versions and the source that an entry holds for."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        path = _PACKAGE / name
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.name}\n".encode())
            digest.update(file.read_bytes())
    versions = [f"{name} {version(name)}" for name in _LIBRARIES]
    return ", ".join([f"python {platform.python_version()}", *versions, digest.hexdigest()])
