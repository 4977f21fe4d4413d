"""What both ends of a gRPC connection agree on: methods, options, certificates; how to dial."""

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, ClassVar, TypeVar

import grpc

from fedsplit.errors import FedsplitError
from fedsplit.transport.admission import NoRoomError, ServerLimits
from fedsplit.transport.alarms import alarm
from fedsplit.transport.chunks import CHUNK_BYTES, announced_bytes, join
from fedsplit.transport.link import LinkError

SERVICE, METHOD, PRESENCE = "fedsplit.Link", "Turn", "Presence"
PING_S = 1.0
# Patience for the answer to a ping, in pings: a busy machine may be late with it.
_PATIENCE = 2
# A link has a connection of its own, as has a node's presence.
_STREAMS_PER_CONNECTION = 8
_RETRY_S = 0.2
# Connections that a process keeps without using them.
_MOST_KEPT = 16
IDLE_S = 5.0
"""How long a server leaves the stream of a link open for the next; who would use it does not wait
for more than half of it."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Tls:
    """Certificates of one end of a TCP connection, as PEM text.

    Parameters
    ----------
    root : bytes or None
        Checks the other end. A server with a root asks its clients for certificates; a client
        without one trusts gRPC's own roots.
    certificate, key : bytes or None
        Prove this end; a server needs both.
    """

    root: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = None

    def for_server(self) -> grpc.ServerCredentials:
        """Return gRPC's form of them for a server."""
        if self.certificate is None or self.key is None:
            raise FedsplitError("tls: a server needs a certificate and its key")
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], self.root, require_client_auth=self.root is not None
        )

    def for_client(self) -> grpc.ChannelCredentials:
        """Return gRPC's form of them for a client."""
        return grpc.ssl_channel_credentials(self.root, self.key, self.certificate)


def options(ping_s: float = PING_S) -> list[tuple[str, int]]:
    """Return gRPC options of both ends: message size, pings to tell dead peers from slow ones.

    A peer that hangs or is cut off answers no ping: it is given up within three times `ping_s`.
    """
    ping_ms = round(1000 * ping_s)
    return [
        ("grpc.max_receive_message_length", CHUNK_BYTES),
        ("grpc.max_send_message_length", CHUNK_BYTES),
        # What may come of a stream before it is asked for: enough for 80 Mbit/s over 100 ms. gRPC
        # would let it grow with the network.
        ("grpc.http2.lookahead_bytes", 2 * CHUNK_BYTES),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.keepalive_time_ms", ping_ms),
        ("grpc.keepalive_timeout_ms", _PATIENCE * ping_ms),
        # Newer gRPC waits this long for the answer to a ping, a minute unless told.
        ("grpc.http2.ping_timeout_ms", _PATIENCE * ping_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A server otherwise takes the pings of a link that waits (for a batch, say) for an attack.
        ("grpc.http2.min_ping_interval_without_data_ms", ping_ms // 2),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def server_options(limits: ServerLimits, ping_s: float) -> list[tuple[str, int]]:
    """Return gRPC options of a server: those of both ends, and what a connection may do."""
    patience_ms = round(1000 * limits.open_timeout_s)
    return [
        *options(ping_s),
        ("grpc.max_concurrent_streams", _STREAMS_PER_CONNECTION),
        ("grpc.max_allowed_incoming_connections", 2 * limits.streams),
        ("grpc.server_handshake_timeout_ms", patience_ms),
        ("grpc.http2.settings_timeout", patience_ms),
        ("grpc.max_connection_idle_ms", patience_ms),
    ]


@dataclass(frozen=True)
class Spare:
    """A stream whose turn has ended well, which may carry the next."""

    call: Any
    outgoing: "queue.SimpleQueue[bytes | None]"
    until_s: float

    @property
    def usable(self) -> bool:
        """Whether the server still waits for what comes over it."""
        return bool(self.call.is_active()) and time.monotonic() < self.until_s


class Connection:
    """A connection to a `GrpcServer`, which comes up with its first call.

    Whoever is done with it keeps it, if all went well, for the next of this process that wants the
    same one, or closes it. A link's stream that ended well is kept with it (`spare`).

    Parameters
    ----------
    target : str
        ``unix:/path/of/socket`` or ``host:port``.
    tls : Tls or None
        Certificates; None for a connection in the clear.
    ping_s : float
        Seconds between keep-alive pings.
    """

    _kept: ClassVar[deque[tuple[Hashable, grpc.Channel, Spare | None]]] = deque()
    _mutex: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, target: str, tls: Tls | None, ping_s: float) -> None:
        # Connections do not survive a fork.
        self._key = (os.getpid(), target, tls, ping_s)
        with self._mutex:
            found = next((item for item in self._kept if item[0] == self._key), None)
            if found is not None:
                self._kept.remove(found)
        self.spare: Spare | None = None
        if found is None:
            self._channel = dial(target, tls, ping_s)
        else:
            _, self._channel, self.spare = found

    def stream(self, method: str, messages: Iterator[bytes]) -> Any:
        """Return a new stream that sends `messages`."""
        # Without serializers, gRPC hands the bytes through as they are.
        stream = self._channel.stream_stream(f"/{SERVICE}/{method}")
        return stream(messages, wait_for_ready=True)

    def keep(self) -> None:
        """Leave it to the next; it is closed instead if many are kept already. Never waits."""
        with self._mutex:
            self._kept.append((self._key, self._channel, self.spare))
            oldest = self._kept.popleft() if len(self._kept) > _MOST_KEPT else None
        if oldest is not None:
            # This may be gRPC's own thread, in which closing would wait for itself.
            threading.Thread(target=oldest[1].close, daemon=True).start()

    def close(self) -> None:
        """End it, and all its streams."""
        self._channel.close()


def dial(target: str, tls: Tls | None, ping_s: float) -> grpc.Channel:
    """Return a new connection to a `GrpcServer`; it comes up with its first call."""
    settings = options(ping_s)
    if _is_here(target):
        settings.append(("grpc.enable_http_proxy", 0))
    if tls is None:
        return grpc.insecure_channel(target, settings)
    return grpc.secure_channel(target, tls.for_client(), settings)


def _is_here(target: str) -> bool:
    """Return whether `target` is on this machine, where no proxy is in between."""
    if target.startswith("unix:"):
        return True
    host = target.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def let_in(attempt: Callable[[float], _T], patience_s: float) -> _T:
    """Return what `attempt`, given the seconds left, returns once the server has room for it.

    Raises
    ------
    NoRoomError
        If it has none within `patience_s`.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            return attempt(until - time.monotonic())
        except NoRoomError:
            if time.monotonic() + _RETRY_S > until:
                raise
        time.sleep(_RETRY_S)


def receive(call: Any, limit_bytes: int, patience_s: float, target: str) -> bytes:
    """Return the next frame of a stream from `target`.

    Raises
    ------
    FrameError
        If it is larger than `limit_bytes`, or not as long as it says.
    NoRoomError
        If the stream was not let in for want of room.
    LinkError
        If the stream is closed or broken, or nothing comes within `patience_s`; it is then over.
    """
    silence = threading.Event()

    def give_up() -> None:
        silence.set()
        call.cancel()

    watchdog = alarm(patience_s, give_up)
    try:
        first: bytes = next(call)
        return join(first, call, announced_bytes(first, limit_bytes))
    except StopIteration:
        raise LinkError(f"link to {target}: closed by the other end") from None
    except grpc.RpcError as error:
        problem = f"{error.code().name} {error.details()}"
        if silence.is_set():
            problem = f"no answer within {round(patience_s, 1):g} s"
        elif error.code() is grpc.StatusCode.CANCELLED:
            problem = "the turn was ended by the other end"
        elif error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise NoRoomError(f"link to {target}: {problem}") from None
        raise LinkError(f"link to {target}: {problem}") from None
    finally:
        watchdog.cancel()
