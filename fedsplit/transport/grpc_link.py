"""A link over gRPC: one bidirectional stream of raw frames for each turn."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import grpc

from fedsplit.transport.client import FrameLink
from fedsplit.transport.connection import METHOD, SERVICE, Tls, options
from fedsplit.transport.frames import Limits
from fedsplit.transport.link import LinkError, OpenRequest


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
    """

    def __init__(
        self,
        target: str,
        *,
        tls: Tls | None = None,
        limits: Limits | None = None,
        connect_timeout_s: float = 10.0,
        reply_timeout_s: float = 600.0,
    ) -> None:
        super().__init__(limits or Limits())
        self._target = target
        self._tls = tls
        self._patience_s = connect_timeout_s
        self._reply_timeout_s = reply_timeout_s
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel: Any = None
        self._call: Any = None

    def open(self, request: OpenRequest) -> None:
        """See `Link.open`."""
        if self._call is None:
            self._connect()
        super().open(request)
        self._patience_s = self._reply_timeout_s

    def _connect(self) -> None:
        settings = options(self._limits)
        if self._tls is None:
            self._channel = grpc.insecure_channel(self._target, settings)
        else:
            self._channel = grpc.secure_channel(self._target, self._tls.for_client(), settings)
        # Without serializers, gRPC hands the bytes through as they are.
        stream = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")
        self._call = stream(self._frames(), wait_for_ready=True)

    def _frames(self) -> Iterator[bytes]:
        while (frame := self._outgoing.get()) is not None:
            yield frame

    def _exchange(self, frame: bytes) -> bytes:
        silence = threading.Event()

        def give_up() -> None:
            silence.set()
            self._call.cancel()

        watchdog = threading.Timer(self._patience_s, give_up)
        watchdog.daemon = True
        watchdog.start()
        self._outgoing.put(frame)
        try:
            reply: bytes = next(self._call)
        except StopIteration:
            raise LinkError(f"link to {self._target}: closed by the other end") from None
        except grpc.RpcError as error:
            problem = f"{error.code().name} {error.details()}"
            if silence.is_set():
                problem = f"no answer within {self._patience_s:g} s"
            raise LinkError(f"link to {self._target}: {problem}") from None
        finally:
            watchdog.cancel()
        return reply

    def _hang_up(self) -> None:
        self._outgoing.put(None)
        if self._call is not None:
            self._call.cancel()
        if self._channel is not None:
            self._channel.close()
