"""Somebody who speaks HTTP/2 as no gRPC library would: byte by byte, or more than was agreed."""

import socket
import struct
import threading
from contextlib import suppress

from fedsplit.transport.connection import METHOD, SERVICE

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GO_AWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_INITIAL_WINDOW = 4  # a setting
_BLOCK = 1 << 14


def message_prefix(size: int) -> bytes:
    """Return what precedes a gRPC message that claims to have `size` bytes."""
    return b"\0" + struct.pack(">I", size)


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: str, value: str) -> bytes:
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class Stranger:
    """A TCP connection to a server, from an address of the loopback network of our choice."""

    def __init__(self, address: str, source: str = "127.0.0.1") -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), 5, (source, 0))
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._changed = threading.Condition()
        self._window = 65535
        self._windows: dict[int, int] = {0: 65535}
        self._greeted = self._closed = False
        self._held = b""
        self.ended: set[int] = set()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> "Stranger":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def send(self, data: bytes) -> bool:
        """Send raw bytes; return whether the connection took them."""
        try:
            self._socket.sendall(data)
        except OSError:
            return False
        return not self._closed

    def greet(self, listens: bool = True) -> None:
        """Begin to speak HTTP/2, and let the server answer or not."""
        settings = b"" if listens else struct.pack(">HI", _INITIAL_WINDOW, 0)
        with self._changed:
            self._greeted = True
            self.send(PREFACE + _frame(_SETTINGS, 0, 0, settings) + self._held)

    def call(self, stream: int, path: str = f"/{SERVICE}/{METHOD}") -> None:
        """Open a stream (1, 3, 5, ...) to a method."""
        names = {":method": "POST", ":scheme": "http", ":path": path}
        names |= {":authority": "x", "te": "trailers", "content-type": "application/grpc"}
        with self._changed:
            self._windows.setdefault(stream, self._window)
        block = b"".join(_literal(name, value) for name, value in names.items())
        self.send(_frame(_HEADERS, _END_HEADERS, stream, block))

    def say(
        self, stream: int, data: bytes, patience_s: float = 2.0, and_no_more: bool = False
    ) -> int:
        """Send `data` on a stream as fast as the server permits; return how much it took."""
        sent = 0
        while sent < len(data):
            with self._changed:
                permitted = self._changed.wait_for(
                    lambda: self._over(stream) or self._permitted(stream) > 0, patience_s
                )
                if not permitted or self._over(stream):
                    break
                size = min(_BLOCK, len(data) - sent, self._permitted(stream))
                self._windows[0] -= size
                self._windows[stream] -= size
            flags = _END_STREAM if and_no_more and sent + size == len(data) else 0
            if not self.send(_frame(_DATA, flags, stream, data[sent : sent + size])):
                break
            sent += size
        return sent

    def is_over(self, stream: int, patience_s: float) -> bool:
        """Return whether the server ends a stream, or the connection, within a time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._over(stream), patience_s)

    def _over(self, stream: int) -> bool:
        return self._closed or stream in self.ended

    def _permitted(self, stream: int) -> int:
        return min(self._windows[0], self._windows[stream])

    def _read(self) -> None:
        with suppress(OSError), self._socket.makefile("rb") as incoming:
            while len(head := incoming.read(9)) == 9:
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                payload = incoming.read(int.from_bytes(head[:3]))
                with self._changed:
                    self._take(kind, flags, stream, payload)
                    self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _answer(self, frame: bytes) -> None:
        if self._greeted:
            self.send(frame)
        else:
            self._held += frame

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _WINDOW:
            self._windows[stream] = self._windows.get(stream, self._window)
            self._windows[stream] += int.from_bytes(payload)
        elif kind == _SETTINGS and not flags & _ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == _INITIAL_WINDOW:
                    for known in self._windows.keys() - {0}:
                        self._windows[known] += value - self._window
                    self._window = value
            self._answer(_frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self._answer(_frame(_PING, _ACK, 0, payload))
        elif kind == _RESET or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
            self.ended.add(stream)
        elif kind == _GO_AWAY:
            self._closed = True
        elif kind == _DATA and payload:
            self._answer(_frame(_WINDOW, 0, 0, struct.pack(">I", len(payload))))
