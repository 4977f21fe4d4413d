"""Strangers at a real server: refused, while a turn goes on undisturbed and memory stays flat."""

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import grpc
import psutil
import pytest
from torch import Tensor

from fedsplit.data import Batch
from fedsplit.models import SplitModel, load
from fedsplit.plan import DEVICE, Route
from fedsplit.transport import (
    Attendance,
    GrpcLink,
    GrpcServer,
    Limits,
    LinkError,
    OpenRequest,
    Presence,
    ServerLimits,
    Tls,
    new_token,
)
from fedsplit.transport.chunks import CHUNK_BYTES
from fedsplit.transport.connection import METHOD, PRESENCE, SERVICE, options
from fedsplit.transport.frames import PREFIX_BYTES, Frame, Kind, decode, encode
from tests.certificates import Authority
from tests.tiny_split import BLOCKS, Cluster, batches, differing, gpt2, initial
from tests.transport.stranger import PREFACE, Stranger, message_prefix
from tests.transport.test_links import _train

ROUTE = Route.two_tier(BLOCKS, 2)
SPEC = gpt2()
STEPS = 6
WHO = "device 0"
METHODS = [f"/{SERVICE}/{name}" for name in (METHOD, PRESENCE)]
ELSEWHERE = "127.0.0.2"  # another peer than the device of the turn
GIGABYTES = (2 << 30) - 1
MEMORY_BYTES = 64 << 20
AHEAD_BYTES = 12 << 20  # what gRPC takes of a stream unasked: 3 MB, at its lowest version 8
LIMITS = ServerLimits(open_timeout_s=1.0)


class Siege:
    """A server with a turn under way, and another one that waits for its device.

    `withstand` runs an attack beside the turn and checks that nothing came of it.
    """

    def __init__(self, cluster: Cluster, device: SplitModel) -> None:
        self._cluster = cluster
        self._device = device
        self._adapters = initial(SPEC)
        _, self._expected = cluster.train(ROUTE, batches(STEPS), self._adapters)
        self.stage = cluster.stage("server")

    def open(self) -> str:
        """Return the token of a turn that waits."""
        return self._cluster.open(ROUTE, self._adapters)["server"]

    def withstand(
        self,
        attack: Callable[[str, str], None],
        limits: ServerLimits = LIMITS,
        server_side: Tls | None = None,
        client_side: Tls | None = None,
    ) -> None:
        """Call ``attack(address, token under way)`` while a turn trains at a server."""
        token, waiting = self.open(), self.open()
        problems: list[BaseException] = []
        attendance = Attendance()
        self.seat = attendance.expect(WHO)
        with (
            GrpcServer(
                self.stage, "127.0.0.1:0", tls=server_side, limits=limits, attendance=attendance
            ) as server,
            Presence(server.address, self.seat, WHO, tls=client_side) as presence,
        ):

            def try_it() -> None:
                try:
                    attack(server.address, token)
                except BaseException as error:
                    problems.append(error)

            attacker = threading.Thread(target=try_it)

            def meanwhile() -> Iterator[Batch]:
                first, *others, last = batches(STEPS)
                yield first
                before = psutil.Process().memory_info().rss
                attacker.start()
                for batch in others:
                    time.sleep(0.05)
                    yield batch
                while attacker.is_alive():
                    attacker.join(0.1)
                    assert psutil.Process().memory_info().rss < before + MEMORY_BYTES
                yield last

            link = GrpcLink(server.address, tls=client_side)
            result = _train(self._device, link, token, meanwhile())
            assert attendance.look(self.seat).state == "present"
            presence.leave()
        if problems:
            raise problems[0]
        self.check(token, result.adapters)
        assert self.stage.status(waiting).state == "waiting", "nobody had its token"

    def check(self, token: str, adapters: dict[str, Tensor]) -> None:
        """Compare a turn with the undisturbed one, bit for bit."""
        assert differing(adapters | self.stage.adapters(token), self._expected) == []


@pytest.fixture(scope="module")
def siege() -> Iterator[Siege]:
    """Return the place under attack."""
    with Cluster(SPEC) as cluster:
        yield Siege(cluster, load(SPEC, ROUTE.on(DEVICE)))


def opening(token: str, number: int = 0) -> bytes:
    """Return a proper opening frame."""
    request = OpenRequest(token, ROUTE, 1)
    return encode(Frame(Kind.OPEN, number, bytes.fromhex(token), request.agreed()))


def announcing(payload_bytes: int, token: str) -> bytes:
    """Return an opening frame that claims to be followed by so many bytes."""
    frame = opening(token)
    return frame[:16] + struct.pack("<Q", payload_bytes) + frame[24:]


def present(token: str, who: str = WHO) -> bytes:
    """Return a proper greeting of a node."""
    return encode(Frame(Kind.PRESENT, 0, bytes.fromhex(token), {"who": who}))


class Caller:
    """Whoever has a gRPC library, and no token."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options())
        else:
            self.channel = grpc.secure_channel(address, credentials, options())

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def refusal(self, *frames: bytes, method: str = METHOD) -> str:
        """Send frames on a stream of their own; return why the last one was refused."""
        stream = self.channel.stream_stream(f"/{SERVICE}/{method}")
        try:
            answers = list(stream(iter(frames), timeout=20))
        except grpc.RpcError as error:
            return str(error.details())
        if not answers:
            return "no answer"
        frame = frames[-1]
        number, token = (0, bytes(16)) if len(frame) < PREFIX_BYTES else _claims(frame)
        reply = decode(answers[-1], Limits(), kinds=[Kind.ERROR], number=number, token=token)
        return str(reply.fields["reason"])


def _claims(frame: bytes) -> tuple[int, bytes]:
    return struct.unpack_from("<Q", frame, 24)[0], frame[32:48]


def test_who_has_no_token_of_a_waiting_turn_is_refused(siege: Siege) -> None:
    spent = siege.open()
    with GrpcServer(siege.stage, "127.0.0.1:0") as server:
        _train(siege._device, GrpcLink(server.address), spent, batches(1))
    mine, other = siege.open(), siege.open()

    def attack(address: str, under_way: str) -> None:
        with Caller(address) as caller:
            assert caller.refusal() == "no answer", "a stream without a frame"
            assert "length" in caller.refusal(b"")
            assert "no turn waits" in caller.refusal(opening("00" * 16)), "no token"
            assert "no turn waits" in caller.refusal(opening(new_token())), "of another run"
            assert "is active" in caller.refusal(opening(under_way)), "replayed"
            assert "is done" in caller.refusal(opening(spent)), "replayed later"
            assert "kind" in caller.refusal(encode(Frame(Kind.CLOSE, 0, bytes.fromhex(mine))))
            stolen = encode(Frame(Kind.CLOSE, 1, bytes.fromhex(other)))
            assert "token" in caller.refusal(opening(mine), stolen), "another branch's"
            assert "not found" in caller.refusal(opening(other), method="Other")
            assert "nobody is expected" in caller.refusal(present(new_token()), method=PRESENCE)
            assert "opens only once" in caller.refusal(present(siege.seat), method=PRESENCE)
            assert "must be 'device 0'" in caller.refusal(
                present(siege.seat, "device 1"), method=PRESENCE
            )
            assert "kind" in caller.refusal(opening(under_way), method=PRESENCE)

    siege.withstand(attack)
    assert siege.stage.status(mine).state == "failed"
    assert siege.stage.status(other).state == "waiting"


def test_who_has_a_wrong_certificate_is_refused(siege: Siege, tmp_path: Path) -> None:
    right, wrong = (_certificates(tmp_path / name) for name in ("right", "wrong"))

    def attack(address: str, under_way: str) -> None:
        for credentials in (
            grpc.ssl_channel_credentials(right.root),
            Tls(right.root, wrong.certificate, wrong.key).for_client(),
            wrong.for_client(),
        ):
            with Caller(address, credentials) as caller:
                assert caller.refusal(opening(under_way))
        with Caller(address) as caller:
            assert caller.refusal(opening(under_way)), "in the clear"

    siege.withstand(attack, server_side=right, client_side=right)


def _certificates(folder: Path) -> Tls:
    folder.mkdir()
    Authority(folder).issue("node")
    names = ("ca.crt", "node.crt", "node.key")
    return Tls(*((folder / name).read_bytes() for name in names))


def test_ten_thousand_random_frames_are_refused(siege: Siege) -> None:
    rng = Random(0)

    def noise(under_way: str) -> bytes:
        frame = opening(under_way)
        kept = frame[: rng.choice((0, 0, 4, 8, 32, PREFIX_BYTES))]
        return kept + rng.randbytes(rng.choice((0, 30, 200, 2000)))

    def attack(address: str, under_way: str) -> None:
        with ExitStack() as stack:
            strangers = [stack.enter_context(Stranger(address, ELSEWHERE)) for _ in range(6)]
            for stranger in strangers:
                stranger.greet()
            streams = iter(range(1, 1 << 31, 2))
            taken: list[tuple[Stranger, int]] = []
            while len(taken) < 10_000:
                if len(taken) >= 24:
                    # A few at a time on each connection: HTTP/2 itself refuses more.
                    stranger, stream = taken[-24]
                    assert stranger.is_over(stream, 10)
                stranger = strangers[len(taken) % len(strangers)]
                stream, data = next(streams), noise(under_way)
                stranger.call(stream, rng.choice(METHODS))
                if stranger.say(stream, message_prefix(len(data)) + data, and_no_more=True):
                    taken.append((stranger, stream))

    siege.withstand(attack)


def test_a_frame_that_announces_two_gigabytes_is_not_taken(siege: Siege) -> None:
    flood = bytes(8 << 20)

    def attack(address: str, under_way: str) -> None:
        with Caller(address) as caller:
            assert "length" in caller.refusal(announcing(GIGABYTES, under_way))
        with Stranger(address, ELSEWHERE) as stranger:
            stranger.greet()
            stranger.call(1)
            assert stranger.say(1, message_prefix(GIGABYTES) + flood) <= AHEAD_BYTES
            assert stranger.is_over(1, 2), "gRPC's own announcement"
            stranger.call(3)
            frame = announcing(GIGABYTES, under_way)
            assert stranger.say(3, message_prefix(len(frame)) + frame + flood) <= AHEAD_BYTES
            assert stranger.is_over(3, 2), "the frame's announcement"
        with Stranger(address, ELSEWHERE) as stranger:
            stranger.greet()
            stranger.send(b"\xff\xff\xff" + struct.pack(">BBI", 0, 0, 1))
            assert stranger.is_over(1, 2), "HTTP/2's announcement"

    siege.withstand(attack)


def test_whoever_dribbles_is_out_in_time(siege: Siege) -> None:
    """Ten bytes a second, and a second until the stream must be open: each gets some ten across."""

    def dribble(say: Callable[[bytes], bool], data: bytes) -> float:
        started = time.monotonic()
        for index in range(len(data)):
            if not say(data[index : index + 1]):
                break
            time.sleep(0.1)
        return time.monotonic() - started

    def attack(address: str, under_way: str) -> None:
        frame = opening(new_token())
        data = message_prefix(len(frame)) + frame
        header = struct.pack(">I", 1 << 14)[1:] + struct.pack(">BBI", 1, 4, 1) + bytes(100)
        with ExitStack() as stack:

            def come(greets: bool = True, listens: bool = True) -> Stranger:
                stranger = stack.enter_context(Stranger(address, ELSEWHERE))
                if greets:
                    stranger.greet(listens)
                return stranger

            mute, silent, deaf, body = come(greets=False), come(), come(listens=False), come()
            for stream, method in zip((1, 3), METHODS, strict=True):
                for stranger in (silent, deaf, body):
                    stranger.call(stream, method)
                deaf.say(stream, data)
            says: list[tuple[Callable[[bytes], bool], bytes]] = [
                (come(greets=False).send, 3 * PREFACE),
                (come().send, header),
                (lambda byte: body.say(1, byte) > 0, data),
                (lambda byte: body.say(3, byte) > 0, data),
            ]
            taken: list[float] = []
            talks = [
                threading.Thread(target=lambda pair=pair: taken.append(dribble(*pair)))
                for pair in says
            ]
            for talk in talks:
                talk.start()
            for talk in talks:
                talk.join()
            assert len(taken) == len(says)
            assert max(taken) < 3 * LIMITS.open_timeout_s
            assert mute.is_over(1, 1), "a connection without a word"
            for stream in (1, 3):
                assert silent.is_over(stream, 1), "a stream without a frame"
                assert deaf.is_over(stream, 1), "a stream that does not take its refusal"

    siege.withstand(attack)


def test_a_flood_from_one_peer_leaves_room_for_another(siege: Siege) -> None:
    """Others fill all their places, again and again; a device comes while they do."""
    limits = ServerLimits(streams=24, streams_per_peer=16, open_timeout_s=1.0)
    late = siege.open()

    def attack(address: str, under_way: str) -> None:
        over = threading.Event()
        refused = 0

        def flood() -> None:
            nonlocal refused
            while not over.is_set():
                with ExitStack() as stack:
                    strangers = [stack.enter_context(Stranger(address, ELSEWHERE)) for _ in "1234"]
                    for stranger in strangers:
                        stranger.greet()
                        for stream in range(1, 17, 2):
                            stranger.call(stream, METHODS[stream % 4 // 2])
                    over.wait(0.3)
                    refused += sum(len(stranger.ended) for stranger in strangers)

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            time.sleep(1.0)
            result = _train(siege._device, GrpcLink(address), late, batches(STEPS))
        finally:
            over.set()
            flooding.join()
        siege.check(late, result.adapters)
        assert refused > 0

    siege.withstand(attack, limits)


def test_frames_wait_for_memory_and_one_peer_cannot_take_it_all(siege: Siege) -> None:
    """Each of five that were let in announces the largest frame, of which two fit at a time."""
    size = 7 * CHUNK_BYTES
    limits = ServerLimits(
        frames=Limits(frame_bytes=size),
        memory_per_peer_bytes=2 * size,
        memory_bytes=3 * size,
        open_timeout_s=20.0,
    )
    tokens = [siege.open() for _ in range(5)]
    rest = 6 * (message_prefix(CHUNK_BYTES) + bytes(CHUNK_BYTES))

    def attack(address: str, under_way: str) -> None:
        with ExitStack() as stack:
            taken: list[int] = []
            strangers = [stack.enter_context(Stranger(address, ELSEWHERE)) for _ in tokens]

            def announce(stranger: Stranger, token: str) -> None:
                frame = opening(token)
                stranger.greet()
                stranger.call(1)
                stranger.say(1, message_prefix(len(frame)) + frame)
                step = encode(Frame(Kind.STEP, 1, bytes.fromhex(token)))
                step = step[:16] + struct.pack("<Q", size - len(step)) + step[24:]
                started = stranger.say(1, message_prefix(CHUNK_BYTES) + step)
                taken.append(started + stranger.say(1, rest[started:], patience_s=1.0))

            threads = [
                threading.Thread(target=announce, args=pair)
                for pair in zip(strangers, tokens, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sum(count == len(rest) for count in taken) == 2
            assert sorted(taken)[2] <= AHEAD_BYTES

    siege.withstand(attack, limits)
    deadline = time.monotonic() + 20
    for token in tokens:
        while siege.stage.status(token).state != "failed":
            assert time.monotonic() < deadline, siege.stage.status(token)
            time.sleep(0.05)
        siege.stage.close_turn(token)


def test_peers_are_told_apart_by_their_certificates(siege: Siege, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    sides = []
    for name in ("server", "device-0", "device-1"):
        authority.issue(name)
        files = ("ca.crt", f"{name}.crt", f"{name}.key")
        sides.append(Tls(*((tmp_path / file).read_bytes() for file in files)))
    limits = ServerLimits(streams=3, streams_per_peer=1)
    with GrpcServer(siege.stage, "127.0.0.1:0", tls=sides[0], limits=limits) as server:
        held, second = (
            GrpcLink(server.address, tls=side, connect_timeout_s=5) for side in sides[1:]
        )
        held.open(OpenRequest(siege.open(), ROUTE, 1))
        second.open(OpenRequest(siege.open(), ROUTE, 1))
        again = GrpcLink(server.address, tls=sides[1], connect_timeout_s=0.5)
        token = siege.open()
        with pytest.raises(LinkError, match="at most 1 of one peer"):
            again.open(OpenRequest(token, ROUTE, 1))
        assert siege.stage.status(token).state == "waiting"
        threading.Timer(0.5, held.abort).start()
        patient = GrpcLink(server.address, tls=sides[1], connect_timeout_s=10)
        patient.open(OpenRequest(token, ROUTE, 1))
        for link in (patient, second):
            link.abort()
