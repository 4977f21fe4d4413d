"""Frames cut into gRPC messages: a receiver learns a frame's size before it takes the frame.

gRPC holds a message in memory until it is whole, unseen. So messages are short, and the first one
of a frame starts with its prefix.
"""

from collections.abc import Iterator

from fedsplit.transport.frames import PREFIX_BYTES, FrameError, frame_size

CHUNK_BYTES = 1 << 19


def split(frame: bytes) -> Iterator[bytes]:
    """Yield the messages that carry `frame`."""
    if len(frame) <= CHUNK_BYTES:
        yield frame
        return
    for start in range(0, len(frame), CHUNK_BYTES):
        yield frame[start : start + CHUNK_BYTES]


def announced_bytes(first: bytes, limit_bytes: int) -> int:
    """Return the size of the frame that begins with the message `first`, by its own account.

    Raises
    ------
    FrameError
        If the frame has no whole prefix, or is larger than `limit_bytes`, or smaller than `first`.
    """
    if len(first) < PREFIX_BYTES:
        raise FrameError(f"length={len(first)}: must be at least {PREFIX_BYTES} bytes")
    size = frame_size(first)
    if not len(first) <= size <= limit_bytes:
        raise FrameError(f"length={size}: must be {len(first)} to {limit_bytes} bytes")
    return size


def join(first: bytes, rest: Iterator[bytes], size_bytes: int) -> bytes:
    """Return the frame of `size_bytes` whose messages are `first` and the next ones of `rest`.

    Raises
    ------
    FrameError
        If they do not add up to it.
    """
    chunks, found = [first], len(first)
    while found < size_bytes:
        chunk = next(rest, b"")
        if not chunk:
            raise FrameError(f"length={found}: must be {size_bytes} as the prefix says")
        chunks.append(chunk)
        found += len(chunk)
    if found > size_bytes:
        raise FrameError(f"length={found}: must be {size_bytes} as the prefix says")
    return b"".join(chunks) if len(chunks) > 1 else first
