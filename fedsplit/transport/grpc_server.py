"""The server end of gRPC links: every stream is a session of its own."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from fedsplit.errors import FedsplitError
from fedsplit.transport.connection import METHOD, PING_S, PRESENCE, SERVICE, Tls, options
from fedsplit.transport.frames import Limits
from fedsplit.transport.link import Host
from fedsplit.transport.presence import Attendance
from fedsplit.transport.session import Session


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
    limits : Limits
        Upper bounds of a frame.
    max_streams : int
        Links at a time; more are refused.
    open_timeout_s : float
        How long a stream may take to say which turn it is for.
    backward_timeout_s : float
        How long the device of a U-shaped route may take between forward and backward, while
        other branches wait; its turn fails then.
    attendance : Attendance or None
        Also keeps the presence of nodes; as many as there may be links.
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
        limits: Limits | None = None,
        max_streams: int = 256,
        open_timeout_s: float = 30.0,
        backward_timeout_s: float = 120.0,
        attendance: Attendance | None = None,
        ping_s: float = PING_S,
    ) -> None:
        self._host = host
        self._limits = limits or Limits()
        self._open_timeout_s = open_timeout_s
        self._backward_timeout_s = backward_timeout_s
        handlers = {METHOD: grpc.stream_stream_rpc_method_handler(self._serve)}
        if attendance is not None:
            self._attendance = attendance
            handlers[PRESENCE] = grpc.stream_stream_rpc_method_handler(self._attend)
        calls = max_streams * len(handlers)
        self._server = grpc.server(
            ThreadPoolExecutor(calls, "link"),
            options=options(self._limits, ping_s),
            maximum_concurrent_rpcs=calls,
        )
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

    def stop(self) -> None:
        """Close all streams, which fails their turns, and stop listening."""
        self._server.stop(grace=None).wait()

    def __enter__(self) -> "GrpcServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serve(self, frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        session = Session(self._host, self._limits)
        watchdog = self._watch(context, self._open_timeout_s)
        try:
            for frame in frames:
                watchdog.cancel()
                yield session.handle(frame)
                session.settle()
                if session.ended:
                    return
                if session.mid_step:
                    watchdog = self._watch(context, self._backward_timeout_s)
        except grpc.RpcError:
            pass  # the peer is gone; the session hears of it below
        finally:
            watchdog.cancel()
            session.hang_up("the device's end of the link is gone")

    def _attend(self, frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        watchdog = self._watch(context, self._open_timeout_s)
        try:
            first = next(frames)
        except (StopIteration, grpc.RpcError):
            return
        finally:
            watchdog.cancel()
        yield from self._attendance.serve(first, context)

    @staticmethod
    def _watch(context: Any, patience_s: float) -> threading.Timer:
        """Cancel a stream unless the timer is cancelled before."""
        watchdog = threading.Timer(patience_s, context.cancel)
        watchdog.daemon = True
        watchdog.start()
        return watchdog
