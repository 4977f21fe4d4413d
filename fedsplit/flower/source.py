"""Which fedsplit source this process runs, so that servers and devices can check they agree."""

import hashlib
from functools import cache
from pathlib import Path

import fedsplit


@cache
def source_hash() -> str:
    """Return 12 hexadecimal digits that depend on every Python file of the imported fedsplit.

    But for the schemes and the command line, which lie in it or beside it, and run on servers.
    """
    assert fedsplit.__file__ is not None
    root = Path(fedsplit.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        if file.relative_to(root).parts[0] in ("apps", "strategies"):
            continue
        digest.update(f"{file.relative_to(root).as_posix()}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
