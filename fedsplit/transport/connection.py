"""What both ends of a gRPC connection agree on: method, options, certificates."""

from dataclasses import dataclass

import grpc

from fedsplit.errors import FedsplitError
from fedsplit.transport.frames import Limits

SERVICE, METHOD = "fedsplit.Link", "Turn"
# A peer that hangs or is cut off answers no ping: it is given up within twice this.
_PING_MS = 2_000


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


def options(limits: Limits) -> list[tuple[str, int]]:
    """Return gRPC options: frame size, and pings that tell a dead peer from a slow one."""
    return [
        ("grpc.max_receive_message_length", limits.frame_bytes),
        ("grpc.max_send_message_length", limits.frame_bytes),
        ("grpc.keepalive_time_ms", _PING_MS),
        ("grpc.keepalive_timeout_ms", _PING_MS),
        # Newer gRPC waits this long for the answer to a ping, a minute unless told.
        ("grpc.http2.ping_timeout_ms", _PING_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # A server otherwise takes the pings of a link that waits (for a batch, say) for an attack.
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_MS // 2),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
