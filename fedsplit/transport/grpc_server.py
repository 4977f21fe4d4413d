"""The server end of gRPC links: every stream is one session after another."""

import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc

from fedsplit.errors import FedsplitError
from fedsplit.transport.admission import Admission, NoRoomError, ServerLimits, peer_of
from fedsplit.transport.alarms import Alarm, alarm
from fedsplit.transport.chunks import announced_bytes, join, split
from fedsplit.transport.connection import (
    IDLE_S,
    METHOD,
    PING_S,
    PRESENCE,
    SERVICE,
    Tls,
    server_options,
)
from fedsplit.transport.frames import FrameError
from fedsplit.transport.link import Host
from fedsplit.transport.presence import Attendance
from fedsplit.transport.session import Session

_Converse = Callable[[str, Iterator[bytes], Any], Iterator[bytes]]


class GrpcServer:
    """Lets links from other processes into the turns of `host`; serves from construction on.

    Parameters
    ----------
    host : Host
        The tier (`fedsplit.execution.Stage`).
    address : str
        ``unix:/path/of/socket``, or ``host:port`` with port 0 for any free one.
    tls : Tls or None
        Certificates; None for connections in the clear.
    limits : ServerLimits or None
        What peers may ask for.
    attendance : Attendance or None
        Also keeps the presence of nodes.
    ping_s : float
        Seconds between keep-alive pings.

    Raises
    ------
    FedsplitError
        If the address cannot be bound.
    """

    def __init__(
        self,
        host: Host,
        address: str,
        *,
        tls: Tls | None = None,
        limits: ServerLimits | None = None,
        attendance: Attendance | None = None,
        ping_s: float = PING_S,
    ) -> None:
        self._host = host
        self._limits = limits or ServerLimits()
        self._admission = Admission(self._limits)
        self._idle: set[Any] = set()
        self._stopping = False
        # Twice as many may knock, so that they are told apart by peer.
        most = 2 * self._limits.streams
        _allow_descriptors(most)
        self._server = grpc.server(
            _ThreadEach(),
            options=server_options(self._limits, ping_s),
            maximum_concurrent_rpcs=most,
        )
        methods: dict[str, _Converse] = {METHOD: self._converse}
        if attendance is not None:
            self._attendance = attendance
            methods[PRESENCE] = self._attend
        handlers = {
            name: grpc.stream_stream_rpc_method_handler(self._admitted(method))
            for name, method in methods.items()
        }
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(SERVICE, handlers)]
        )
        try:
            if tls is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, tls.for_server())
        except RuntimeError as error:
            raise FedsplitError(f"address={address!r}: cannot be bound ({error})") from None
        is_tcp = not address.startswith("unix:")
        self.address = f"{address.rpartition(':')[0]}:{port}" if is_tcp else address
        self._server.start()

    def stop(self, grace_s: float | None = None) -> None:
        """Stop listening and close all streams, which fails their turns.

        With `grace_s`, answers that are on their way have so long to leave.
        """
        self._stopping = True
        stopped = self._server.stop(grace_s)
        for context in self._idle.copy():  # whose turns have all their answers
            context.cancel()
        stopped.wait()

    def __enter__(self) -> "GrpcServer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop(self._limits.grace_s if kind is None else None)

    def _admitted(self, method: _Converse) -> Callable[[Iterator[bytes], Any], Iterator[bytes]]:
        def serve(chunks: Iterator[bytes], context: Any) -> Iterator[bytes]:
            peer = peer_of(context)
            try:
                with self._admission.stream(peer):
                    yield from method(peer, chunks, context)
            except NoRoomError as error:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

        return serve

    def _converse(self, peer: str, chunks: Iterator[bytes], context: Any) -> Iterator[bytes]:
        session = Session(self._host, self._limits.frames, context.cancel)
        with _Watchdog(context) as watchdog:
            try:
                watchdog.allow(self._limits.open_timeout_s)
                for first in chunks:
                    self._idle.discard(context)
                    with ExitStack() as held:
                        reply = self._reply(session, peer, first, chunks, context, held)
                        watchdog.allow(self._patience_s(session))
                        yield from split(reply)
                    session.settle()
                    if session.closed:  # in good order: the peer may have another turn
                        session = Session(self._host, self._limits.frames, context.cancel)
                        watchdog.allow(IDLE_S)
                        self._idle.add(context)
                        if self._stopping:
                            return
                    elif session.ended:
                        return
            except grpc.RpcError:
                pass  # the peer is gone; the session hears of it below
            finally:
                self._idle.discard(context)
                session.hang_up("the device's end of the link is gone")

    def _reply(
        self,
        session: Session,
        peer: str,
        first: bytes,
        rest: Iterator[bytes],
        context: Any,
        held: ExitStack,
    ) -> bytes:
        """Return the answer to the frame that begins with `first`; its memory goes to `held`."""
        frames, opening_bytes = self._limits.frames, self._limits.opening_bytes
        try:
            limit = frames.frame_bytes if session.opened else min(opening_bytes, frames.frame_bytes)
            size = announced_bytes(first, limit)
            room = min(size + session.unpacked_bytes(size), self._limits.memory_per_peer_bytes)
            urgent, wanted = session.mid_step, context.is_active
            held.enter_context(self._admission.memory(peer, room, urgent=urgent, wanted=wanted))
            return session.handle(join(first, rest, size))
        except FrameError as error:
            return session.refuse(first, str(error))

    def _patience_s(self, session: Session) -> float | None:
        """Return how long the peer may take to read the answer and say what must follow."""
        if session.ended:
            return self._limits.open_timeout_s
        return self._limits.backward_timeout_s if session.mid_step else None

    def _attend(self, peer: str, chunks: Iterator[bytes], context: Any) -> Iterator[bytes]:
        with _Watchdog(context) as watchdog:
            watchdog.allow(self._limits.open_timeout_s)
            try:
                first = next(chunks)
            except (StopIteration, grpc.RpcError):
                return
            for words in self._attendance.serve(first, context):
                yield words
                watchdog.allow(None)


def _allow_descriptors(count: int) -> None:
    """Let this process open so many connections, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _ThreadEach(ThreadPoolExecutor):
    """Gives every stream a thread that ends with it; a pool would keep as many as there ever were.

    How many there may be is for `Admission` to say.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Run a call in a thread of its own."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="link", daemon=True).start()
        return future


class _Watchdog:
    """Cancels a stream that does not get on in time."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._alarm: Alarm | None = None

    def __enter__(self) -> "_Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self.allow(None)

    def allow(self, patience_s: float | None) -> None:
        """Begin to wait anew, for so long; None for as long as it takes."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if patience_s is not None:
            self._alarm = alarm(patience_s, self._context.cancel)
