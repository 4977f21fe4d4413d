"""Which fedsplit source this process runs, so that servers and devices can check they agree."""

import hashlib
from functools import cache
from pathlib import Path

import fedsplit


@cache
def source_hash() -> str:
    """Return 12 hexadecimal digits that depend on every Python file of the imported fedsplit."""
    assert fedsplit.__file__ is not None
    root = Path(fedsplit.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
