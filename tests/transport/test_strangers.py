"""Strangers at a real server: refused, while a turn goes on undisturbed and memory stays flat."""

import socket
import struct
import time
from collections.abc import Iterator
from random import Random

import grpc
import psutil
import pytest

from fedsplit.data import Batch
from fedsplit.models import load
from fedsplit.plan import DEVICE, Route
from fedsplit.transport import GrpcLink, GrpcServer, Limits, OpenRequest
from fedsplit.transport.connection import METHOD, SERVICE, options
from fedsplit.transport.frames import PREFIX_BYTES, Frame, Kind, decode, encode
from tests.tiny_split import BLOCKS, Cluster, batches, differing, gpt2, initial
from tests.transport.test_links import _train

ROUTE = Route.two_tier(BLOCKS, 2)
SPEC = gpt2()
HONEST = OpenRequest("ab" * 16, ROUTE, 1)


def ask(channel: grpc.Channel, frame: bytes) -> str:
    """Send one frame on a stream of its own; return why it was refused."""
    stream = channel.stream_stream(f"/{SERVICE}/{METHOD}")
    try:
        answer = next(iter(stream(iter([frame]), timeout=20)))
    except grpc.RpcError as error:
        return str(error.details())
    number, token = (0, bytes(16)) if len(frame) < PREFIX_BYTES else _claims(frame)
    reply = decode(answer, Limits(), kinds=[Kind.ERROR], number=number, token=token)
    return str(reply.fields["reason"])


def _claims(frame: bytes) -> tuple[int, bytes]:
    return struct.unpack_from("<Q", frame, 24)[0], frame[32:48]


def announcing(payload_bytes: int) -> bytes:
    """Return an opening frame that claims to be followed by so many bytes."""
    frame = encode(Frame(Kind.OPEN, 0, bytes.fromhex(HONEST.token), HONEST.agreed()))
    return frame[:16] + struct.pack("<Q", payload_bytes) + frame[24:]


def test_strangers_are_refused_and_disturb_nobody() -> None:
    adapters = initial(SPEC)
    device = load(SPEC, ROUTE.on(DEVICE))
    with Cluster(SPEC) as cluster:
        _, expected = cluster.train(ROUTE, batches(2), adapters)
        stage = cluster.stage("server")
        good, other = (cluster.open(ROUTE, adapters)["server"] for _ in range(2))
        rng = Random(0)
        with GrpcServer(stage, "127.0.0.1:0") as server:
            channel = grpc.insecure_channel(server.address, options(Limits()))

            def meanwhile() -> Iterator[Batch]:
                first, second = batches(2)
                yield first
                opening = Frame(Kind.OPEN, 0, bytes.fromhex(HONEST.token), HONEST.agreed())
                assert "no turn waits" in ask(channel, encode(opening)), "a token of another run"
                replay = Frame(Kind.OPEN, 0, bytes.fromhex(good), HONEST.agreed())
                assert "is active" in ask(channel, encode(replay)), "a token seen before"
                assert ask(channel, announcing(2 << 30))
                for _ in range(50):
                    assert ask(channel, rng.randbytes(rng.randrange(200)))
                memory = psutil.Process().memory_info().rss
                for _ in range(500):
                    assert ask(channel, rng.randbytes(rng.randrange(2000)))
                    assert ask(channel, announcing(2 << 30))
                assert psutil.Process().memory_info().rss < memory + (16 << 20)
                yield second

            result = _train(device, GrpcLink(server.address), good, meanwhile())
            channel.close()
        assert differing(result.adapters | stage.adapters(good), expected) == []
        assert stage.status(other).state == "waiting", "whose token nobody had"


def test_a_frame_larger_than_allowed_is_not_even_read() -> None:
    with (
        Cluster(SPEC) as cluster,
        GrpcServer(
            cluster.stage("server"), "127.0.0.1:0", limits=Limits(frame_bytes=1000)
        ) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        assert "larger" in ask(channel, bytes(5000))


@pytest.mark.parametrize("talk", ["silent stream", "one byte a time"])
def test_a_stranger_that_says_little_holds_nothing_for_long(talk: str) -> None:
    """A single stream is served here: whoever follows must wait until the stranger is out."""
    adapters = initial(SPEC)
    device = load(SPEC, ROUTE.on(DEVICE))
    with Cluster(SPEC) as cluster:
        stage = cluster.stage("server")
        with GrpcServer(stage, "127.0.0.1:0", max_streams=1, open_timeout_s=0.5) as server:
            host, _, port = server.address.rpartition(":")
            with socket.create_connection((host, int(port))) as slow:
                channel = grpc.insecure_channel(server.address)
                if talk == "silent stream":
                    stream = channel.stream_stream(f"/{SERVICE}/{METHOD}")
                    call = stream(iter(lambda: time.sleep(60) or b"", None))
                    with pytest.raises(grpc.RpcError):
                        next(iter(call))
                else:
                    for byte in b"PRI * HTTP":
                        slow.send(bytes([byte]))
                        time.sleep(0.05)
                token = cluster.open(ROUTE, adapters)["server"]
                _train(device, GrpcLink(server.address), token)
                channel.close()
            assert stage.status(token).state == "done"
