"""A link over gRPC: a bidirectional stream of raw frames, which carries one turn after another."""

import queue
import time
from collections.abc import Callable
from typing import Any

from fedsplit.models import Crossing
from fedsplit.transport.chunks import split
from fedsplit.transport.client import FrameLink
from fedsplit.transport.connection import (
    IDLE_S,
    METHOD,
    PING_S,
    Connection,
    Spare,
    Tls,
    let_in,
    receive,
)
from fedsplit.transport.frames import Limits
from fedsplit.transport.link import OpenRequest


class GrpcLink(FrameLink):
    """A `Link` to a `GrpcServer`, connected when it is opened.

    Parameters
    ----------
    target : str
        ``unix:/path/of/socket`` or ``host:port``.
    tls : Tls or None
        Certificates; None for a connection in the clear.
    limits : Limits
        Upper bounds of a frame.
    connect_timeout_s : float
        How long to wait for the server to be there and let the link in.
    reply_timeout_s : float
        How long to wait for an answer, which may have to queue behind other branches. A peer that
        dies is noticed at once, whatever this is.
    ping_s : float
        Seconds between keep-alive pings.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: Tls | None = None,
        limits: Limits | None = None,
        connect_timeout_s: float = 10.0,
        reply_timeout_s: float = 600.0,
        ping_s: float = PING_S,
    ) -> None:
        super().__init__(limits or Limits())
        self._target = target
        self._tls = tls
        self._patience_s = connect_timeout_s
        self._reply_timeout_s = reply_timeout_s
        self._ping_s = ping_s
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._connection: Connection | None = None
        self._call: Any = None
        self._entered = False

    def open(self, request: OpenRequest, returning: Crossing | None = None) -> frozenset[int]:
        """See `Link.open`."""
        if self._connection is None:
            self._connection = Connection(self._target, self._tls, self._ping_s)
        held = super().open(request, returning)
        self._patience_s, self._entered = self._reply_timeout_s, True
        return held

    def _send(self, frame: bytes) -> Callable[[], bytes]:
        if self._entered:
            self._put(frame)
            return lambda: self._receive(self._patience_s)

        def attempt(patience_s: float) -> bytes:
            self._start_stream()
            self._put(frame)
            return self._receive(patience_s)

        return lambda: let_in(attempt, self._patience_s)

    def _start_stream(self) -> None:
        self._outgoing.put(None)  # ends the sender of the stream before
        assert self._connection is not None
        spare, self._connection.spare = self._connection.spare, None
        if spare is not None and spare.usable:
            self._call, self._outgoing = spare.call, spare.outgoing
            return
        if spare is not None:
            spare.outgoing.put(None)
        self._outgoing = outgoing = queue.SimpleQueue[bytes | None]()
        self._call = self._connection.stream(METHOD, iter(outgoing.get, None))

    def _put(self, frame: bytes) -> None:
        for chunk in split(frame):
            self._outgoing.put(chunk)

    def _receive(self, patience_s: float) -> bytes:
        return receive(self._call, self._limits.frame_bytes, patience_s, self._target)

    def _hang_up(self) -> None:
        self._outgoing.put(None)
        if self._call is not None:
            self._call.cancel()
        if self._connection is not None:
            self._connection.close()

    def _part(self) -> None:
        if self._connection is not None:
            until_s = time.monotonic() + IDLE_S / 2
            self._connection.spare = Spare(self._call, self._outgoing, until_s)
            self._connection.keep()
        # None of it is this link's any more.
        self._connection, self._call, self._outgoing = None, None, queue.SimpleQueue()
