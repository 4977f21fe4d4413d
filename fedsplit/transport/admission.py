"""Who a server lets in, and with how much: streams and memory, of each peer and in all."""

import hashlib
import ipaddress
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import unquote

from fedsplit.errors import require
from fedsplit.transport.frames import Limits
from fedsplit.transport.link import LinkError

_IPV6_NETWORK = 64  # bits: what is commonly given to one subscriber
_LOOK_S = 1.0


class NoRoomError(LinkError):
    """A stream was not let in, nothing of it was read: it may come again later."""


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What a server takes from its peers, and how long it waits for them.

    A peer is a certificate where clients show one, else an address (an IPv6 network); all that use
    a Unix socket are one. Devices behind one NAT may share an address, so one peer may have many
    streams and much memory, but never all.

    Parameters
    ----------
    frames : Limits
        Upper bounds of a frame.
    opening_bytes : int
        Upper bound of a stream's first frame, before it has shown a token.
    streams, streams_per_peer : int
        Links at a time, the idle ones that wait a few seconds for another turn, and presences of
        nodes; who wants more has to wait until one ends. The default is enough for the two of each
        of 1,000 devices behind one address.
    memory_bytes, memory_per_peer_bytes : int
        Frames at a time, from their first bytes to their answer, and what a codec unpacks of them.
        A frame that does not fit waits where it is, with its sender; gRPC takes up to 3 MiB ahead.
    held_bytes : int
        Boundaries of devices whose blocks only infer that are kept in memory, in all; each device
        has an equal part, and the rest of its samples goes to a file.
    held_samples : int
        Samples of such a device at most.
    waiting_steps : int
        Steps of one tier that wait, with their activations in memory, for their device (U shape)
        or for the next tier. Others queue for a place; steps that wait for nobody need none.
    open_timeout_s : float
        How long a stream may take to show its token, and a connection to carry a stream.
    backward_timeout_s : float
        How long the device of a U-shaped route may take between forward and backward, while its
        step has a place; its turn fails then.
    supply_timeout_s : float
        How long a device may wait for the adapters that its turn starts from.
    grace_s : float
        How long the answer to the last close may take to leave, where a server stops in good order.

    Raises
    ------
    FedsplitError
        If one is not above 0, or a frame would not fit into a peer's memory.
    """

    frames: Limits = field(default_factory=Limits)
    opening_bytes: int = 1 << 16
    streams: int = 4096
    streams_per_peer: int = 3072
    memory_bytes: int = 1 << 31
    memory_per_peer_bytes: int = 1 << 30
    held_bytes: int = 1 << 30
    held_samples: int = 10_000_000
    waiting_steps: int = 16
    open_timeout_s: float = 30.0
    backward_timeout_s: float = 120.0
    supply_timeout_s: float = 600.0
    grace_s: float = 2.0

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name != "frames":
                value = getattr(self, item.name)
                require(value > 0, item.name, value, "above 0")
        smaller = (
            ("frames.frame_bytes", self.frames.frame_bytes, "memory_per_peer_bytes"),
            ("memory_per_peer_bytes", self.memory_per_peer_bytes, "memory_bytes"),
            ("streams_per_peer", self.streams_per_peer, "streams"),
        )
        for name, value, bound in smaller:
            limit = getattr(self, bound)
            require(value <= limit, name, value, f"at most {bound}={limit}")


def peer_of(context: Any) -> str:
    """Return the name under which the other end of a gRPC stream is counted."""
    certificates = context.auth_context().get("x509_pem_cert")
    if certificates:
        return f"certificate {hashlib.sha256(certificates[0]).hexdigest()}"
    scheme, _, rest = unquote(context.peer()).partition(":")
    if scheme not in ("ipv4", "ipv6"):
        return str(scheme)
    address = ipaddress.ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, _IPV6_NETWORK), strict=False))
        address = address.ipv4_mapped
    return str(address)


class Admission:
    """Counts streams and bytes; safe to use from any thread.

    Parameters
    ----------
    limits : ServerLimits
        What may be counted.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._changed = threading.Condition()
        self._streams: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    @contextmanager
    def stream(self, peer: str) -> Iterator[None]:
        """Count a stream of `peer` while it lasts.

        Raises
        ------
        NoRoomError
            If there are too many.
        """
        limits = self._limits
        with self._changed:
            if self._streams[peer] >= limits.streams_per_peer:
                raise NoRoomError(
                    f"streams: at most {limits.streams_per_peer} of one peer at a time"
                )
            if self._streams.total() >= limits.streams:
                raise NoRoomError(f"streams: at most {limits.streams} at a time")
            self._streams[peer] += 1
        try:
            yield
        finally:
            with self._changed:
                _lower(self._streams, peer, 1)

    @contextmanager
    def memory(
        self, peer: str, size_bytes: int, *, urgent: bool, wanted: Callable[[], bool]
    ) -> Iterator[None]:
        """Count the bytes of a frame while it is held; wait until they fit.

        Parameters
        ----------
        peer : str
            Whose frame it is.
        size_bytes : int
            At most ``frames.frame_bytes``.
        urgent : bool
            Do not wait: others wait for this frame, and may hold the memory it would wait for.
        wanted : callable
            Whether to go on waiting, asked every second.

        Raises
        ------
        NoRoomError
            If the frame is not wanted any more.
        """
        with self._changed:
            while not (urgent or self._fits(peer, size_bytes)):
                if not wanted():
                    raise NoRoomError("memory: the peer left while its frame waited for room")
                self._changed.wait(_LOOK_S)
            self._bytes[peer] += size_bytes
        try:
            yield
        finally:
            with self._changed:
                _lower(self._bytes, peer, size_bytes)
                self._changed.notify_all()

    def _fits(self, peer: str, size_bytes: int) -> bool:
        limits = self._limits
        return (
            self._bytes[peer] + size_bytes <= limits.memory_per_peer_bytes
            and self._bytes.total() + size_bytes <= limits.memory_bytes
        )


def _lower(counts: Counter[str], peer: str, amount: int) -> None:
    counts[peer] -= amount
    if not counts[peer]:
        del counts[peer]  # strangers come under ever new names
