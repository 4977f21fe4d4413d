"""Streams end with their turns, and there are enough of them."""

import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from fedsplit.execution import train_turn
from fedsplit.transport import GrpcLink, LinkError, OpenRequest
from fedsplit.transport.connection import METHOD, SERVICE
from fedsplit.transport.frames import Kind, encode
from tests.tiny_split import OPTIMIZER, batches
from tests.transport.stranger import PREFACE, message_prefix
from tests.trust.besieged import BOUNDS, HOME, ROUTE, Besieged, Peer, honest_step, model_of, opening

_SETTINGS, _PING = 4, 6


def _threads() -> int:
    """Return how many threads serve streams."""
    return sum(thread.name == "link" for thread in threading.enumerate())


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _soon(condition: Callable[[], bool], patience_s: float = 10.0) -> bool:
    until = time.monotonic() + patience_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def test_turns_that_are_given_up_leave_neither_threads_nor_descriptors(
    besieged: Besieged,
) -> None:
    """In three states: just opened, waiting for adapters, and in mid-step with a place taken."""
    device = model_of(HOME)
    (batch,) = batches(1)
    inputs = device.travelling(batch.inputs, HOME)
    boundary = device.run(HOME.segments[0], batch.inputs)
    crossing = device.crossing(HOME.segments[-1].start)
    stage = besieged.stage
    with besieged.serving() as address:
        for_warmth = GrpcLink(address)
        for_warmth.open(OpenRequest(besieged.open(), ROUTE, 1))
        for_warmth.abort()
        assert _soon(lambda: _threads() == 0)
        before = _descriptors()
        links, tokens, fetching = [], [], []
        for index in range(60):
            state = ("opened", "fetching", "mid-step")[index % 3]
            on_link = state == "fetching"
            others = {"fetched": besieged.adapters, "supply": False} if on_link else {}
            token = besieged.open(HOME, **others)
            link = GrpcLink(address)
            link.open(OpenRequest(token, HOME, 1, adapters_on_link=on_link), crossing)
            if on_link:
                fetching.append(_expect_failure(lambda link=link: link.fetch({})))
            if state == "mid-step" and index < 45:  # 15 of 16 places
                link.forward(inputs, boundary, batch.samples)
            links.append(link)
            tokens.append(token)
        assert _threads() == 60
        started = time.monotonic()
        for token in tokens:
            stage.close_turn(token)
        assert time.monotonic() - started < 1.0
        assert _soon(lambda: _threads() == 0)
        for thread in fetching:
            thread.join(10)
        for link in links:
            with pytest.raises(LinkError):
                link.backward(())
            link.abort()
        assert _soon(lambda: _descriptors() <= before)
        assert stage._places._free == stage._limits.waiting_steps


def _expect_failure(call: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        with pytest.raises(LinkError):
            call()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_the_device_of_a_turn_that_is_given_up_hears_of_it_at_once(besieged: Besieged) -> None:
    token = besieged.open()
    with besieged.serving() as address:
        link = GrpcLink(address)
        link.open(OpenRequest(token, ROUTE, 1))
        besieged.stage.close_turn(token)
        with pytest.raises(LinkError, match="ended by the other end"):
            link.close()


def test_silence_in_mid_step_holds_nobody_up(besieged: Besieged) -> None:
    """Devices of U-shaped routes that say no more after their forward, while others train."""
    device, honest = model_of(HOME), model_of(ROUTE)

    def attack(address: str) -> None:
        with ExitStack() as stack:
            tokens = [besieged.open(HOME) for _ in range(8)]
            for token in tokens:
                link = GrpcLink(address)
                stack.callback(link.abort)
                (batch,) = batches(1)
                link.open(OpenRequest(token, HOME, 1), device.crossing(3))
                inputs = device.travelling(batch.inputs, HOME)
                link.forward(inputs, device.run(HOME.segments[0], batch.inputs), batch.samples)
            other = besieged.open(bounds=BOUNDS)
            started = time.monotonic()
            train_turn(
                honest,
                ROUTE,
                batches(3),
                adapters=besieged.adapters,
                optimizer=OPTIMIZER,
                seed=0,
                link=GrpcLink(address),
                token=other,
            )
            assert time.monotonic() - started < 20
            for token in tokens:
                assert besieged.stage.status(token).state == "active"
                besieged.stage.close_turn(token)

    besieged.withstand(attack)


def _http2(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _call(method: str, frame: bytes) -> bytes:
    """Return what opens a connection, calls `method` on it and sends a frame."""
    names = {":method": "POST", ":scheme": "http", ":path": f"/{SERVICE}/{method}"}
    names |= {":authority": "x", "te": "trailers", "content-type": "application/grpc"}
    block = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in names.items()
    )
    data = message_prefix(len(frame)) + frame
    return PREFACE + _http2(4, 0, 0, b"") + _http2(1, 4, 1, block) + _http2(0, 0, 1, data)


class _Crowd:
    """Many streams, each on a connection of its own, that answer pings and say nothing else."""

    def __init__(self, path: str, frames: list[bytes]) -> None:
        self._selector = selectors.DefaultSelector()
        self._over = threading.Event()
        self._unread: dict[socket.socket, bytes] = {}
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        for frame in frames:
            one = socket.socket(socket.AF_UNIX)
            one.connect(path)
            one.sendall(_call(METHOD, frame))
            self._unread[one] = b""
            self._selector.register(one, selectors.EVENT_READ)

    def __enter__(self) -> "_Crowd":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._reader.join()
        for one in self._unread:
            one.close()
        self._selector.close()

    def _read(self) -> None:
        while not self._over.is_set():
            for key, _ in self._selector.select(0.1):
                one = key.fileobj
                assert isinstance(one, socket.socket)
                data = one.recv(1 << 16)
                if not data:
                    self._selector.unregister(one)
                self._unread[one] = self._answer(one, self._unread[one] + data)

    @staticmethod
    def _answer(one: socket.socket, data: bytes) -> bytes:
        """Acknowledge settings and pings; return what is not a whole frame yet."""
        while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3]):
            size, kind, flags = int.from_bytes(data[:3]), data[3], data[4]
            if kind in (_SETTINGS, _PING) and not flags & 1:
                one.sendall(_http2(kind, 1, 0, data[9 : 9 + size] if kind == _PING else b""))
            data = data[9 + size :]
        return data


def test_a_thousand_devices_at_once_find_room(besieged: Besieged) -> None:
    """A link of each, all from one peer; the honest turn goes on beside them."""
    device = model_of(ROUTE)
    tokens = [besieged.open() for _ in range(1000)]
    frames = [encode(opening(token)) for token in tokens]
    try:

        def attack(address: str) -> None:
            with _Crowd(address.removeprefix("unix:"), frames):
                assert _soon(
                    lambda: all(besieged.stage.status(token).state == "active" for token in tokens),
                    60,
                )
                assert _threads() >= 1000
                late = besieged.open()
                with Peer(address) as peer:
                    step = honest_step(device, late)
                    assert peer.say(opening(late), step).kind is Kind.STEP_REPLY

        besieged.withstand(attack, memory_bytes=512 << 20)
        assert _soon(lambda: _threads() == 0)
    finally:
        for token in tokens:
            besieged.stage.close_turn(token)
