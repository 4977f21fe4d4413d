"""What both ends of a gRPC connection agree on: methods, options, certificates; how to dial."""

import threading
from dataclasses import dataclass
from typing import Any

import grpc

from fedsplit.errors import FedsplitError
from fedsplit.transport.frames import Limits
from fedsplit.transport.link import LinkError

SERVICE, METHOD, PRESENCE = "fedsplit.Link", "Turn", "Presence"
PING_S = 1.0
# Patience for the answer to a ping, in pings: a busy machine may be late with it.
_PATIENCE = 2


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


def options(limits: Limits, ping_s: float = PING_S) -> list[tuple[str, int]]:
    """Return gRPC options: frame size, and pings that tell a dead peer from a slow one.

    A peer that hangs or is cut off answers no ping: it is given up within three times `ping_s`.
    """
    ping_ms = round(1000 * ping_s)
    return [
        ("grpc.max_receive_message_length", limits.frame_bytes),
        ("grpc.max_send_message_length", limits.frame_bytes),
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


def dial(target: str, tls: Tls | None, limits: Limits, ping_s: float) -> grpc.Channel:
    """Return a connection to a `GrpcServer`; it comes up with its first call."""
    settings = options(limits, ping_s)
    if tls is None:
        return grpc.insecure_channel(target, settings)
    return grpc.secure_channel(target, tls.for_client(), settings)


def receive(call: Any, patience_s: float, target: str) -> bytes:
    """Return the next frame of a stream from `target`.

    Raises
    ------
    LinkError
        If the stream is closed or broken, or nothing comes within `patience_s`; it is then over.
    """
    silence = threading.Event()

    def give_up() -> None:
        silence.set()
        call.cancel()

    watchdog = threading.Timer(patience_s, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        frame: bytes = next(call)
    except StopIteration:
        raise LinkError(f"link to {target}: closed by the other end") from None
    except grpc.RpcError as error:
        problem = f"{error.code().name} {error.details()}"
        if silence.is_set():
            problem = f"no answer within {patience_s:g} s"
        raise LinkError(f"link to {target}: {problem}") from None
    finally:
        watchdog.cancel()
    return frame
