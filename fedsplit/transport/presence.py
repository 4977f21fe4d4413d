"""Presence: a stream that every node keeps open while it works on a task, before and beside links.

Its end tells the server at once that a node was killed, and keep-alive pings that it hangs or was
cut off. Over it the server can also tell a node something in the middle of its task.
"""

import atexit
import hmac
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc

from fedsplit.errors import FedsplitError
from fedsplit.transport.connection import PING_S, PRESENCE, Connection, Tls, let_in, receive
from fedsplit.transport.frames import Frame, FrameError, Kind, Limits, claimed, decode, encode
from fedsplit.transport.link import LinkError, new_token

EXPECTED, PRESENT, LEFT, BROKEN = "expected", "present", "left", "broken"
_FRAMES = Limits(frame_bytes=1 << 16, header_bytes=1 << 15)
_LEAVE_S = 2.0
_REASON_CHARACTERS = 2000


@dataclass(frozen=True)
class Attention:
    """How a node stands to the task it was given.

    Parameters
    ----------
    state : str
        "expected" (not yet come), "present", "left" in good order, or "broken".
    since_s : float
        When it came to that, on `time.monotonic`'s clock.
    reason : str
        Why it is "broken": the node's own words if it had time for them.
    """

    state: str
    since_s: float
    reason: str = ""


@dataclass
class _Seat:
    who: str
    attention: Attention
    outbox: "queue.SimpleQueue[bytes | None]" = field(default_factory=queue.SimpleQueue)
    told: int = 0


class Attendance:
    """The server's side: which of the nodes that were given a task are there.

    Each task has a token of its own, which lets the one node it was given to be present, once.
    """

    def __init__(self) -> None:
        self._seats: dict[bytes, _Seat] = {}
        self._mutex = threading.Lock()

    def expect(self, who: str) -> str:
        """Return a fresh token for a task of `who` ("device 3, round 2"), who has to say so too."""
        token = new_token()
        with self._mutex:
            self._seats[bytes.fromhex(token)] = _Seat(who, Attention(EXPECTED, time.monotonic()))
        return token

    def look(self, token: str) -> Attention:
        """Return how the bearer of `token` stands.

        Raises
        ------
        LinkError
            If the token was never given out, or forgotten.
        """
        return self._seat(bytes.fromhex(token)).attention

    def present(self) -> list[Attention]:
        """Return those who are there, in the order of their tokens' making."""
        with self._mutex:
            found = [seat.attention for seat in self._seats.values()]
        return [attention for attention in found if attention.state == PRESENT]

    def come(self, token: str) -> None:
        """Enter the bearer of `token`, seen by this process itself; nothing if it is forgotten."""
        with self._mutex:
            seat = self._seats.get(bytes.fromhex(token))
        if seat is not None:
            self._change(seat, (EXPECTED,), Attention(PRESENT, time.monotonic()))

    def tell(self, token: str, words: Mapping[str, Any]) -> None:
        """Send `words`, a small JSON mapping, to the bearer of `token`, present or yet to come.

        Raises
        ------
        LinkError
            If the token was never given out, or forgotten.
        FedsplitError
            If the words are too many.
        """
        key = bytes.fromhex(token)
        seat = self._seat(key)
        with self._mutex:
            frame = encode(Frame(Kind.TELL, seat.told + 1, key, {"words": dict(words)}))
            if len(frame) > _FRAMES.header_bytes:
                raise FedsplitError(f"words: {len(frame)} bytes, must be <= {_FRAMES.header_bytes}")
            seat.told += 1
            seat.outbox.put(frame)

    def forget(self, token: str) -> None:
        """End the bearer's stream: what it was to do is over."""
        with self._mutex:
            seat = self._seats.pop(bytes.fromhex(token), None)
        if seat is not None:
            seat.outbox.put(None)

    def serve(self, first: bytes, context: Any) -> Iterator[bytes]:
        """Answer the stream whose first frame is `first`; gRPC's side of it is `context`."""
        try:
            frame = decode(first, _FRAMES, kinds=(Kind.PRESENT, Kind.LEAVE), number=0, token=None)
            seat = self._find(frame.token)
            if frame.kind is Kind.LEAVE:
                self._leave(seat, frame.fields["reason"])
                yield encode(Frame(Kind.GOODBYE, 0, frame.token))
                return
            self._enter(seat, frame.fields["who"])
        except FedsplitError as error:
            yield encode(Frame(Kind.ERROR, *claimed(first), {"reason": str(error)}))
            return

        def gone() -> None:
            broken = "its process ended, hangs or was cut off"
            self._change(seat, (PRESENT,), Attention(BROKEN, time.monotonic(), broken))
            seat.outbox.put(None)

        if not context.add_callback(gone):
            gone()
        yield encode(Frame(Kind.WELCOME, 0, frame.token))
        while (words := seat.outbox.get()) is not None:
            yield words

    def _find(self, token: bytes) -> _Seat:
        """Return the seat for a token that a stranger may have sent."""
        with self._mutex:
            # Every token is compared in full: the time taken tells nothing about them.
            found = [key for key in self._seats if hmac.compare_digest(key, token)]
        return self._seat(found[0] if found else token)

    def _seat(self, token: bytes) -> _Seat:
        """Return the seat for a token; this process asks for its own over and over."""
        with self._mutex:
            seat = self._seats.get(token)
        if seat is None:
            raise LinkError("token: nobody is expected with it")
        return seat

    def _enter(self, seat: _Seat, who: str) -> None:
        if who != seat.who:
            raise FrameError(f"who={who!r:.80}: must be {seat.who!r}")
        if not self._change(seat, (EXPECTED,), Attention(PRESENT, time.monotonic())):
            raise LinkError(f"token: {seat.who} is {seat.attention.state}, it opens only once")

    def _leave(self, seat: _Seat, reason: str) -> None:
        state = BROKEN if reason else LEFT
        self._change(seat, (EXPECTED, PRESENT), Attention(state, time.monotonic(), reason))

    def _change(self, seat: _Seat, states: tuple[str, ...], attention: Attention) -> bool:
        with self._mutex:
            if seat.attention.state not in states:
                return False
            seat.attention = attention
            return True


class Presence:
    """A node's side: present from construction on. A context manager around the task.

    If the task fails, the server is told why at once. If it ends well, the node stays present until
    the server has its answer or the process ends, so that an answer that gets lost is noticed too.

    Parameters
    ----------
    target, token, who : str
        Where the server is, what lets this node in, and the name that goes with it.
    tls : Tls or None
        Certificates; None for a connection in the clear.
    connect_timeout_s : float
        How long to wait for the server to be there.
    ping_s : float
        Seconds between keep-alive pings.

    Raises
    ------
    LinkError
        If the server refuses, or cannot be reached.
    """

    def __init__(
        self,
        target: str,
        token: str,
        who: str,
        *,
        tls: Tls | None = None,
        connect_timeout_s: float = 10.0,
        ping_s: float = PING_S,
    ) -> None:
        self._target = target
        self._token = bytes.fromhex(token)
        self._told = 0
        self._parting = False
        self._connection = Connection(target, tls, ping_s)

        def attempt(patience_s: float) -> None:
            self._call = self._stream(Kind.PRESENT, {"who": who})
            self._read(self._call, Kind.WELCOME, 0, patience_s)

        try:
            let_in(attempt, connect_timeout_s)
        except FedsplitError:
            self._close()
            raise
        atexit.register(self.leave)
        self._call.add_done_callback(lambda _: self._ended())

    def __enter__(self) -> "Presence":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.leave(str(error) or type(error).__name__)

    def wait_for_words(self, timeout_s: float) -> dict[str, Any]:
        """Return what the server tells next.

        Raises
        ------
        LinkError
            If it tells nothing within `timeout_s`, or is gone; presence is then over.
        """
        frame = self._read(self._call, Kind.TELL, self._told + 1, timeout_s)
        self._told += 1
        return dict(frame.fields["words"])

    def leave(self, reason: str = "") -> None:
        """Leave in good order, or because the task failed for `reason`; once only."""
        if self._parting or self._call.done():
            return
        self._parting = True
        try:
            parting = self._stream(Kind.LEAVE, {"reason": reason[:_REASON_CHARACTERS]})
            self._read(parting, Kind.GOODBYE, 0, _LEAVE_S)
        except FedsplitError:
            pass  # then the end of the stream has to speak for itself
        self._close()

    def _stream(self, kind: Kind, fields: Mapping[str, str]) -> Any:
        first = encode(Frame(kind, 0, self._token, fields))
        return self._connection.stream(PRESENCE, iter([first]))

    def _read(self, call: Any, kind: Kind, number: int, patience_s: float) -> Frame:
        data = receive(call, _FRAMES.frame_bytes, patience_s, self._target)
        frame = decode(data, _FRAMES, kinds=(kind, Kind.ERROR), number=number, token=self._token)
        if frame.kind is Kind.ERROR:
            raise LinkError(f"the server refused: {frame.fields['reason']}")
        return frame

    def _ended(self) -> None:
        if self._parting:
            return
        if self._call.code() is grpc.StatusCode.OK:  # the server has what it wanted
            atexit.unregister(self.leave)
            self._connection.keep()
        else:
            # This is gRPC's own thread, in which closing would wait for itself.
            threading.Thread(target=self._close, daemon=True).start()

    def _close(self) -> None:
        atexit.unregister(self.leave)
        self._connection.close()
