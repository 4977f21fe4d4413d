"""One run at a time in an output folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsplit.errors import FedsplitError

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the lock of a run's folder, which exists; yield its file descriptor.

    The lock lasts as long as any process has the descriptor open. Who inherits it keeps the
    folder, even when the process that took the lock is killed. Where the file system knows no
    locks there is none.

    Raises
    ------
    FedsplitError
        If another run holds it, naming its process, or the folder cannot be written.
    """
    name = f"output={str(folder)!r}"
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise FedsplitError(f"{name}: cannot be written ({error.strerror})") from error
    try:
        _take(descriptor, name)
        yield descriptor
    finally:
        os.close(descriptor)


def _take(descriptor: int, name: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        process = os.pread(descriptor, 32, 0).decode().strip()
        raise FedsplitError(f"{name}: is running (pid {process})") from None
    except OSError:
        return
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
