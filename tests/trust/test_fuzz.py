"""Random frames, and good ones that were tampered with, by somebody who has a token.

Every kind of frame, in every state of a turn, with every codec: refused, or harmless.
"""

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch

from fedsplit.codec import registry
from fedsplit.errors import FedsplitError
from fedsplit.execution import compute
from fedsplit.models import Boundary
from fedsplit.plan import CodecPlan, Route
from fedsplit.transport import Attendance, InProcessLink, Limits, OpenRequest, new_token
from fedsplit.transport.frames import MAGIC, PREFIX_BYTES, VERSION, Kind, decode
from fedsplit.transport.session import Session
from tests.tiny_split import OPTIMIZER, batches
from tests.trust.besieged import HOME, ROUTE, Besieged, model_of

INNER = {"name": "int8"}
SETTINGS: dict[str, dict[str, object]] = {
    "low_rank": {"factors": INNER, "rank": 2},
    "transform": {"inner": {"name": "topk", "keep": 0.2, "statistics": "column"}},
    "temporal": {"key": INNER, "residual": {"name": "topk", "keep": 0.2}},
    "error_feedback": {"inner": INNER},
    "int8": {"lossless": "zstd"},
    "topk": {"keep": 0.2, "scale": "token"},
}
CODECS = {name: {"name": name, **SETTINGS.get(name, {})} for name in registry.CODECS}
MEMORY_BYTES = 128 << 20
KINDS = list(Kind)


class Recorder(InProcessLink):
    """A link that keeps what it sends and gets, and can have answers tampered with."""

    tamper: Callable[[bytes], bytes] = staticmethod(lambda answer: answer)

    def _send(self, frame: bytes) -> Callable[[], bytes]:
        self.sent = [*getattr(self, "sent", []), frame]
        answer = super()._send(frame)
        return lambda: self.tamper(answer())


@dataclass(frozen=True)
class Talk:
    """What an honest device says in a turn: its frames, and how the turn is opened."""

    route: Route
    codec: CodecPlan
    train: bool
    on_link: bool
    frames: tuple[bytes, ...]

    def again(self, besieged: Besieged) -> str:
        """Return the token of a fresh turn in which the same may be said."""
        return _open(besieged, self.route, self.codec, self.train, self.on_link)


def _open(besieged: Besieged, route: Route, codec: CodecPlan, train: bool, on_link: bool) -> str:
    others: dict[str, Any] = {"fetched": _of_device(besieged, route)} if on_link else {}
    return besieged.open(route, codec, optimizer=OPTIMIZER if train else None, **others)


def _of_device(besieged: Besieged, route: Route) -> dict[str, torch.Tensor]:
    return {
        name: besieged.adapters[name]
        for segment in route.on("device")
        for name in besieged.stage._model.adapter_names(segment)
    }


def _request(talk_of: tuple[Route, CodecPlan, bool, bool], token: str) -> OpenRequest:
    route, codec, train, on_link = talk_of
    return OpenRequest(token, route, 1, codec, train=train, adapters_on_link=on_link)


def _converse(besieged: Besieged, link: InProcessLink, *talk_of: Any) -> None:
    """Say what an honest device says."""
    route, _, train, on_link = talk_of
    device = model_of(route)
    token = _open(besieged, *talk_of)
    crossing = device.crossing(route.segments[-1].start) if route.returns_home else None
    link.open(_request(talk_of, token), crossing)
    adapters = _of_device(besieged, route)
    if on_link:
        adapters = link.fetch(adapters)
    (batch,) = batches(1)
    inputs = device.travelling(batch.inputs, route)
    sent = compute(lambda: device.run(route.segments[0], batch.inputs))
    assert isinstance(sent, Boundary)
    sent = sent.leaf() if train else sent.detach()
    if route.returns_home:
        came = link.forward(inputs, sent, batch.samples)
        if train:
            link.backward(tuple(torch.ones_like(item) for item in came.tensors))
    elif train:
        link.step(inputs, sent, batch.samples)
    else:
        link.evaluate(inputs, sent, batch.samples)
    if on_link and train:
        link.hand_up(adapters)
    link.close()


SHAPES = [(ROUTE, True, False), (HOME, True, True), (ROUTE, False, False), (HOME, False, True)]
TALKS = [
    (route, CodecPlan(settings, settings), train, on_link)
    for settings in CODECS.values()
    for route, train, on_link in SHAPES
]


@pytest.fixture(scope="module")
def talks(besieged: Besieged) -> list[Talk]:
    """Return an honest talk for every codec, route and purpose."""
    found = []
    for talk_of in TALKS:
        link = Recorder(besieged.stage)
        _converse(besieged, link, *talk_of)
        found.append(Talk(*talk_of, tuple(link.sent)))
    kinds = {frame[6] for talk in found for frame in talk.frames}
    asked = "OPEN STEP FORWARD BACKWARD EVALUATE CLOSE FETCH HAND_UP"
    assert kinds == {Kind[name] for name in asked.split()}
    return found


def _renewed(frame: bytes, token: str) -> bytes:
    return frame[:32] + bytes.fromhex(token) + frame[48:]


def _noise(rng: Random, number: int, token: str) -> bytes:
    """Return a frame of which the prefix may be good, and the rest is not."""
    body = rng.choice(
        [
            rng.randbytes(rng.choice((0, 16, 300))),
            json.dumps(_nonsense(rng, 0)).encode(),
            b'{"tensors":' + json.dumps(_nonsense(rng, 0)).encode() + b"}",
            b'{"inputs":' + json.dumps(_nonsense(rng, 0)).encode() + b"}",
        ]
    )
    payload = rng.randbytes(rng.choice((0, 0, 64, 2048)))
    kind, size = rng.choice(KINDS), len(body)
    if rng.random() < 0.1:
        size = rng.randrange(1 << 32)
    prefix = struct.pack("<4sHHIIQQ", MAGIC, VERSION, kind, 0, size, len(payload), number)
    return prefix + bytes.fromhex(token) + body + payload


def _nonsense(rng: Random, depth: int) -> object:
    leaves = [None, True, 0, -1, 1 << 62, 1e308, "float32", "labels", "", [2, 8, 32]]
    choice = rng.randrange(4 if depth < 4 else 1)
    if choice < 2:
        return rng.choice(leaves)
    inner = [_nonsense(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = ["labels", "attention_mask", "x", "layout"]
    return inner if choice == 2 else dict(zip(rng.sample(names, len(inner)), inner, strict=True))


def _tampered(rng: Random, frame: bytes) -> bytes:
    """Return a good frame with one thing changed, and a prefix that fits."""
    size = int.from_bytes(frame[12:16], "little")
    header, payload = frame[PREFIX_BYTES : PREFIX_BYTES + size], frame[PREFIX_BYTES + size :]
    way = rng.randrange(6)
    if way == 0:  # any byte
        return _flipped(rng, frame)
    if way == 1:  # a number in the header
        header = _renumbered(rng, header)
    elif way == 2:  # a byte of the header
        header = _flipped(rng, header)
    elif way == 3:  # bytes of what a codec reads
        for _ in range(rng.randrange(1, 4)):
            payload = _flipped(rng, payload)
    elif way == 4:  # more or less of it
        cut = rng.randrange(len(payload) + 1)
        payload = payload[:cut] + rng.randbytes(rng.choice((0, 1, 40)))
        header = header.replace(str(len(frame)).encode(), str(len(payload)).encode())
    else:  # the whole payload
        payload = rng.randbytes(len(payload))
    prefix = frame[:12] + struct.pack("<IQ", len(header), len(payload)) + frame[24:PREFIX_BYTES]
    return prefix + header + payload


def _flipped(rng: Random, data: bytes) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]


def _renumbered(rng: Random, header: bytes) -> bytes:
    places = [index for index, byte in enumerate(header) if 48 <= byte < 58]
    if not places:
        return header
    at = rng.choice(places)
    other = rng.choice((b"0", b"-1", b"1", b"9", b"99999", b"1e9", b"null", b'"x"', b"[]"))
    return header[:at] + other + header[at + 1 :]


def _attempt(besieged: Besieged, talk: Talk, at: int, change: Callable[[bytes], bytes]) -> bool:
    """Say `talk` until its frame `at`, then a changed one; return whether that was refused."""
    token = talk.again(besieged)
    session = Session(besieged.stage, Limits())
    for frame in talk.frames[:at]:
        session.handle(_renewed(frame, token))
        session.settle()
        assert not session.ended
    data = change(_renewed(talk.frames[at], token))
    answer = session.handle(data)
    session.settle()
    claims = (0, bytes(16)) if len(data) < PREFIX_BYTES else (_number(data), data[32:48])
    reply = decode(answer, Limits(), kinds=KINDS, number=claims[0], token=claims[1])
    refused = reply.kind is Kind.ERROR
    if refused:
        assert reply.fields["reason"]
        assert session.ended
    session.hang_up("the end of the attempt")
    besieged.stage.close_turn(token)
    return refused


def _number(data: bytes) -> int:
    return int(struct.unpack_from("<Q", data, 24)[0])


def _withstands(besieged: Besieged, talks: list[Talk], attempts: int) -> None:
    """Try so many random and so many tampered frames, in every state of every talk."""
    states = [(talk, at) for talk in talks for at in range(len(talk.frames))]
    rng = Random(0)
    refused = {"random": 0, "tampered": 0}

    def attack(address: str) -> None:
        for index in range(attempts):
            # The first frames of a talk cost nothing, those behind a step a step.
            talk, at = states[index % len(states)]
            if index % 8:
                at = min(at, 1)
            number = _number(talk.frames[at])
            refused["random"] += _attempt(
                besieged,
                talk,
                at,
                lambda frame, n=number: _noise(rng, n, frame[32:48].hex()),
            )
        for index in range(attempts):
            talk, at = states[index % len(states)]
            if index % 4:
                at = min(at, 1 + talk.on_link)
            refused["tampered"] += _attempt(besieged, talk, at, lambda f: _tampered(rng, f))

    besieged.withstand(attack, MEMORY_BYTES)
    assert refused["random"] > 0.99 * attempts
    assert refused["tampered"] > 0.5 * attempts


def test_frames_from_a_bearer_of_a_token(besieged: Besieged, talks: list[Talk]) -> None:
    _withstands(besieged, talks, 10_000)


@pytest.mark.slow
def test_ten_times_as_many(besieged: Besieged, talks: list[Talk]) -> None:
    _withstands(besieged, talks, 100_000)


@pytest.mark.parametrize("name", CODECS)
def test_answers_of_a_server_that_lies(name: str, besieged: Besieged) -> None:
    """The device ends its turn with one clear error, or does not notice."""
    rng = Random(name)
    for index in range(40):
        route, train, on_link = SHAPES[index % len(SHAPES)]
        link = Recorder(besieged.stage)
        countdown = iter([*[False] * (index % 5), True])

        def tamper(answer: bytes, countdown: Iterator[bool] = countdown) -> bytes:
            return _tampered(rng, answer) if next(countdown, False) else answer

        link.tamper = tamper  # type: ignore[method-assign]
        codec = CodecPlan(CODECS[name], CODECS[name])
        with suppress(FedsplitError):
            _converse(besieged, link, route, codec, train, on_link)
        link.abort()


def test_greetings_of_nodes() -> None:
    """Presence has frames of its own."""
    attendance, rng = Attendance(), Random(0)
    token = new_token()
    for index in range(2_000):
        seat = attendance.expect(f"device {index}") if index % 2 else token
        data = _noise(rng, 0, seat)
        if index % 2:
            body = json.dumps({"fields": {"who": f"device {index}"}}).encode()
            prefix = struct.pack("<4sHHIIQQ", MAGIC, VERSION, Kind.PRESENT, 0, len(body), 0, 0)
            data = _flipped(rng, prefix + bytes.fromhex(seat) + body)
        answers = attendance.serve(data, _Nowhere())
        first = next(answers)
        answers.close()
        assert first[6] in (Kind.ERROR, Kind.WELCOME, Kind.GOODBYE)


class _Nowhere:
    """gRPC's side of a stream that never ends."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return True
