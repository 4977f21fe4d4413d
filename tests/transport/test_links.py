"""A link that goes wrong, in whatever way, ends its own turn with a clear error and no other."""

import datetime
import ipaddress
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.data import Batch
from fedsplit.errors import FedsplitError
from fedsplit.execution import TurnResult, compute, train_turn
from fedsplit.models import Boundary, SplitModel, load
from fedsplit.plan import DEVICE, CodecPlan, Route
from fedsplit.transport import (
    GrpcLink,
    GrpcServer,
    InProcessLink,
    Limits,
    Link,
    LinkError,
    OpenRequest,
    ServerLimits,
    Tls,
    new_token,
)
from fedsplit.transport.frames import Frame, Kind, decode, encode
from fedsplit.transport.session import Session
from fedsplit.transport.tensors import Stream, TensorCoder, pack_inputs
from tests.tiny_split import BLOCKS, OPTIMIZER, Cluster, batches, differing, gpt2, initial

ROUTE = Route.two_tier(BLOCKS, 2)
HOME = Route.u_shaped(BLOCKS, 1, 3)
SPEC = gpt2()


@pytest.fixture(scope="module")
def device() -> SplitModel:
    """Return the device's part of the model."""
    return load(SPEC, [*ROUTE.on(DEVICE), *HOME.on(DEVICE)])


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Return a cluster reached in process."""
    with Cluster(SPEC) as found:
        yield found


@pytest.fixture
def remote() -> Iterator[Cluster]:
    """Return a cluster reached over gRPC."""
    with Cluster(SPEC, "grpc") as found:
        yield found


def _sample(device: SplitModel, route: Route = ROUTE) -> tuple[dict[str, torch.Tensor], Boundary]:
    """Return what the device sends up in a step."""
    (batch,) = batches(1)
    boundary = compute(lambda: device.run(route.segments[0], batch.inputs))
    assert isinstance(boundary, Boundary)
    return device.travelling(batch.inputs, route), boundary


def _train(device: SplitModel, link: Link, token: str, data: Iterable[Batch] = ()) -> TurnResult:
    """Run the device's turn on `data`, or on three mini-batches."""
    return train_turn(
        device,
        ROUTE,
        data or batches(3),
        adapters=initial(SPEC),
        optimizer=OPTIMIZER,
        seed=0,
        link=link,
        token=token,
    )


class Tampering(InProcessLink):
    """An in-process link that changes the frame of one exchange."""

    def __init__(self, cluster: Cluster, at: int, change: Callable[[bytes], bytes]) -> None:
        super().__init__(cluster.stage("server"))
        self._at, self._change = at, change

    def _exchange(self, frame: bytes) -> bytes:
        self._at -= 1
        if self._at == -1:
            changed = self._change(frame)
            assert changed != frame
            frame = changed
        return super()._exchange(frame)


def _renumber(frame: bytes, step: int) -> bytes:
    (number,) = struct.unpack_from("<Q", frame, 24)
    return frame[:24] + struct.pack("<Q", number + step) + frame[32:]


ATTACKS = {
    "truncated": lambda frame: frame[:-5],
    "empty": lambda frame: b"",
    "too long": lambda frame: frame + b"\0",
    "other magic": lambda frame: b"HTTP" + frame[4:],
    "repeated": lambda frame: _renumber(frame, -1),
    "reordered": lambda frame: _renumber(frame, +1),
    "other token": lambda frame: frame[:32] + bytes(16) + frame[48:],
    "other type": lambda frame: frame.replace(b'"float32"', b'"float64"'),
    "other shape": lambda frame: frame.replace(b"[14,32]", b"[14,31]"),
    "other kind": lambda frame: frame[:6] + bytes([Kind.EVALUATE, 0]) + frame[8:],
    "unsuitable": lambda frame: frame.replace(b"[14,32]", b"[32,14]"),
    "other mask": lambda frame: frame.replace(b"\1\1\1\1\1\1\1\0", b"\1\1\1\1\1\1\0\0"),
    "whole for a part": lambda frame: frame.replace(b"[14,32]", b"[2,8,32]"),
    "other layout": lambda frame: frame.replace(b'"layout":"{', b'"layout":"['),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bad_frame_fails_its_turn_and_disturbs_no_other(
    attack: str, cluster: Cluster, device: SplitModel
) -> None:
    adapters = initial(SPEC)
    _, expected = cluster.train(ROUTE, batches(4), adapters)
    good = cluster.open(ROUTE, adapters)["server"]
    bad = cluster.open(ROUTE, adapters)["server"]
    stage = cluster.stage("server")

    data = batches(4)

    def interrupted() -> Iterator[Batch]:
        yield from data[:2]
        with pytest.raises(FedsplitError) as caught:
            _train(load(SPEC, ROUTE.on(DEVICE)), Tampering(cluster, 2, ATTACKS[attack]), bad)
        assert len(str(caught.value)) > 20
        yield from data[2:]

    result = _train(device, cluster.link("server"), good, interrupted())
    assert differing(result.adapters | stage.adapters(good), expected) == []
    assert stage.status(bad).state == "failed"
    assert stage.status(bad).steps == 1
    assert stage.status(bad).reason
    with pytest.raises(FedsplitError, match="must be done"):
        stage.adapters(bad)


def test_a_frame_of_another_branch_is_refused(cluster: Cluster, device: SplitModel) -> None:
    adapters = initial(SPEC)
    first, second = (cluster.open(ROUTE, adapters)["server"] for _ in range(2))
    stolen = bytes.fromhex(second)
    link = Tampering(cluster, 1, lambda frame: frame[:32] + stolen + frame[48:])
    with pytest.raises(FedsplitError, match="token"):
        _train(device, link, first)
    assert cluster.stage("server").status(first).state == "failed"
    assert cluster.stage("server").status(second).state == "waiting"
    _train(device, cluster.link("server"), second)
    assert cluster.stage("server").status(second).state == "done"


def test_a_token_opens_its_turn_once(cluster: Cluster, device: SplitModel) -> None:
    token = cluster.open(ROUTE, initial(SPEC))["server"]
    with pytest.raises(LinkError, match="no turn waits"):
        _train(device, cluster.link("server"), new_token())

    def meanwhile() -> Iterator[Batch]:
        yield batches(1)[0]
        with pytest.raises(LinkError, match="is active"):
            _train(device, cluster.link("server"), token)
        yield batches(1)[0]

    result = _train(device, cluster.link("server"), token, meanwhile())
    assert result.steps == 2
    with pytest.raises(LinkError, match="is done"):
        _train(device, cluster.link("server"), token)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("route", {"route": Route.two_tier(BLOCKS, 1)}),
        ("position", {"route": Route.three_tier(BLOCKS, 1, 2), "position": 2}),
        ("codec", {"codec": CodecPlan({"name": "bf16"})}),
        ("seed", {"seed": 5}),
        ("train", {"train": False}),
        ("adapters_on_link", {"adapters_on_link": True}),
    ],
)
def test_both_ends_must_mean_the_same_turn(
    field: str, other: dict[str, object], cluster: Cluster
) -> None:
    token = cluster.open(ROUTE, initial(SPEC))["server"]
    request = {"token": token, "route": ROUTE, "position": 1} | other
    with pytest.raises(LinkError, match="route" if field == "position" else field):
        cluster.link("server").open(OpenRequest(**request))  # type: ignore[arg-type]
    assert cluster.stage("server").status(token).state == "failed"


@pytest.mark.parametrize("token", ["", "00", "zz" * 16, "0" * 31 + " "])
def test_a_request_needs_a_proper_token_and_never_shows_it(token: str) -> None:
    with pytest.raises(FedsplitError, match="32 hexadecimal digits") as caught:
        OpenRequest(token, ROUTE, 1)
    assert not token or token not in str(caught.value)


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_session_answers_noise_with_an_error_frame(noise: list[bytes]) -> None:
    session = Session(_NoTurns(), Limits())
    for data in noise:
        answer = session.handle(data)
        session.settle()
        number, token = (0, bytes(16)) if len(data) < 48 else _claims(data)
        frame = decode(answer, Limits(), kinds=[Kind.ERROR], number=number, token=token)
        assert frame.fields["reason"]
    assert session.ended


def _claims(data: bytes) -> tuple[int, bytes]:
    return struct.unpack_from("<Q", data, 24)[0], data[32:48]


class _NoTurns:
    """A host without turns."""

    def enter(self, token: bytes) -> object:
        raise LinkError("token: no turn waits for it")


def test_refused_streams_leave_no_memory_behind(cluster: Cluster, device: SplitModel) -> None:
    stage = cluster.stage("server")
    inputs, boundary = _sample(device)
    coder = TensorCoder(CodecPlan(), 0)
    step = Frame(
        Kind.STEP,
        1,
        bytes(16),
        inputs=pack_inputs(inputs),
        tensors=coder.pack(Stream.BOUNDARY_UP, boundary.tensors, ()),
        layout=boundary.layout,
    )
    data = encode(step)

    def attack(times: int) -> None:
        for _ in range(times):
            session = Session(stage, Limits())
            session.handle(data)
            session.settle()
            session.hang_up("test")

    attack(20)
    tracemalloc.start()
    try:
        attack(20)
        before = tracemalloc.get_traced_memory()[0]
        attack(400)
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 50_000


def test_calls_out_of_order_are_refused(cluster: Cluster, device: SplitModel) -> None:
    inputs, boundary = _sample(device)
    with pytest.raises(LinkError, match="opened first"):
        cluster.link("server").step(inputs, boundary, (0, 1))
    token = cluster.open(ROUTE, initial(SPEC))["server"]
    link = cluster.link("server")
    link.open(OpenRequest(token, ROUTE, 1))
    with pytest.raises(LinkError, match="opened before"):
        link.open(OpenRequest(token, ROUTE, 1))
    with pytest.raises(LinkError, match="kind"):
        link.forward(inputs, boundary, (0, 1))
    with pytest.raises(LinkError, match="ended"):
        link.step(inputs, boundary, (0, 1))


def test_a_frame_over_the_limit_is_refused(device: SplitModel, tmp_path: Path) -> None:
    with Cluster(SPEC) as cluster:
        stage = cluster.stage("server")
        for kind in ("in-process", "grpc"):
            token = cluster.open(ROUTE, initial(SPEC))["server"]
            small = Limits(frame_bytes=1500)
            limits = ServerLimits(frames=small)
            with GrpcServer(stage, f"unix:{tmp_path}/{kind}", limits=limits) as server:
                link: Link = GrpcLink(server.address)
                if kind == "in-process":
                    link = InProcessLink(stage, small)
                with pytest.raises(LinkError, match=r"length|larger"):
                    _train(device, link, token)
                assert _state_soon(cluster, token) == "failed"


def test_a_dead_device_fails_its_turn_at_once_and_holds_nobody_up(
    remote: Cluster, device: SplitModel
) -> None:
    adapters = initial(SPEC)
    inputs, boundary = _sample(device, HOME)
    _, expected = remote.train(ROUTE, batches(2), adapters)
    dead = remote.open(HOME, adapters)["server"]
    link = remote.link("server")
    link.open(OpenRequest(dead, HOME, 1), device.crossing(3))
    link.forward(inputs, boundary, (0, 1))  # its activations wait for the backward pass
    _, others = remote.train(ROUTE, batches(2), adapters)
    assert differing(others, expected) == []
    assert remote.stage("server").status(dead).state == "active"
    link.abort()
    assert _state_soon(remote, dead) == "failed"
    assert "gone" in remote.stage("server").status(dead).reason


def test_a_device_that_never_sends_its_gradients_is_given_up(
    device: SplitModel, tmp_path: Path
) -> None:
    inputs, boundary = _sample(device, HOME)
    with Cluster(SPEC) as cluster:
        token = cluster.open(HOME, initial(SPEC))["server"]
        limits = ServerLimits(backward_timeout_s=0.2)
        with GrpcServer(cluster.stage("server"), f"unix:{tmp_path}/s", limits=limits) as server:
            link = GrpcLink(server.address)
            link.open(OpenRequest(token, HOME, 1), device.crossing(3))
            link.forward(inputs, boundary, (0, 1))
            assert _state_soon(cluster, token) == "failed"
            _, adapters = cluster.train(ROUTE, batches(1), initial(SPEC))
            assert adapters
            with pytest.raises(LinkError):
                link.backward((torch.zeros(2, 8, 32),))


def test_a_dead_server_is_noticed_by_the_device(remote: Cluster, device: SplitModel) -> None:
    token = remote.open(ROUTE, initial(SPEC))["server"]
    link = remote.link("server")

    def dying() -> Iterator[Batch]:
        yield batches(1)[0]
        remote._servers["server"].stop()
        yield batches(1)[0]

    started = time.perf_counter()
    with pytest.raises(LinkError, match="link to unix:"):
        _train(device, link, token, dying())
    assert time.perf_counter() - started < 20


def test_silence_and_absence_end_in_an_error(tmp_path: Path) -> None:
    request = OpenRequest(new_token(), ROUTE, 1)
    with pytest.raises(LinkError, match=r"no answer within 0.3 s"):
        GrpcLink(f"unix:{tmp_path}/nobody", connect_timeout_s=0.3).open(request)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(LinkError, match=r"no answer within 0.3 s"):
            GrpcLink(address, connect_timeout_s=0.3).open(request)


def test_a_broken_second_hop_fails_the_turn_on_every_tier(device: SplitModel) -> None:
    route = Route.three_tier(BLOCKS, 2, 3)
    with Cluster(SPEC, "grpc") as cluster:
        tokens = cluster.open(route, initial(SPEC))

        def dying() -> Iterator[Batch]:
            yield batches(1)[0]
            cluster._servers["cloud"].stop()
            yield batches(1)[0]

        with pytest.raises(LinkError, match="next tier refused"):
            train_turn(
                device,
                route,
                dying(),  # type: ignore[arg-type]
                adapters=initial(SPEC),
                optimizer=OPTIMIZER,
                seed=0,
                link=cluster.link("edge"),
                token=tokens["edge"],
            )
        assert _state_soon(cluster, tokens["edge"], "edge") == "failed"
        assert _state_soon(cluster, tokens["cloud"], "cloud") == "failed"


def test_two_servers_cannot_share_an_address(cluster: Cluster) -> None:
    stage = cluster.stage("server")
    with GrpcServer(stage, "127.0.0.1:0") as server:
        assert server.address.rpartition(":")[2] != "0"
        with pytest.raises(FedsplitError, match="cannot be bound"):
            GrpcServer(stage, server.address)


def test_tls_lets_in_who_proves_itself(device: SplitModel) -> None:
    server_side, client_side = _certificates()
    with Cluster(SPEC) as cluster:
        stage = cluster.stage("server")
        with GrpcServer(stage, "127.0.0.1:0", tls=server_side) as server:
            for stranger in (None, Tls(root=server_side.root)):
                request = OpenRequest(new_token(), ROUTE, 1)
                link = GrpcLink(server.address, tls=stranger, connect_timeout_s=1)
                with pytest.raises(LinkError, match="no answer"):
                    link.open(request)
            token = cluster.open(ROUTE, initial(SPEC))["server"]
            _train(device, GrpcLink(server.address, tls=client_side), token)
            assert stage.status(token).state == "done"
    with pytest.raises(FedsplitError, match="certificate"):
        Tls().for_server()


@pytest.mark.slow
def test_a_link_outlives_a_long_silence(remote: Cluster, device: SplitModel) -> None:
    token = remote.open(ROUTE, initial(SPEC))["server"]

    def hesitating() -> Iterator[Batch]:
        yield batches(1)[0]
        time.sleep(60)  # several keep-alive pings
        yield batches(1)[0]

    result = _train(device, remote.link("server"), token, hesitating())
    assert result.steps == 2


def _state_soon(cluster: Cluster, token: str, tier: str = "server") -> str:
    """Return the turn's state once it has stopped, or after a few seconds."""
    patience = time.monotonic() + 10
    while (state := cluster.stage(tier).status(token).state) == "active":
        if time.monotonic() > patience:
            break
        time.sleep(0.01)
    return state


def _certificates() -> tuple[Tls, Tls]:
    """Return a server's and a client's certificates; each is its own root."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pems = []
    for _ in range(2):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fedsplit test")])
        now = datetime.datetime.now(datetime.UTC)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        pems.append(
            (
                certificate.public_bytes(serialization.Encoding.PEM),
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                ),
            )
        )
    (server, server_key), (client, client_key) = pems
    return Tls(client, server, server_key), Tls(server, client, client_key)
