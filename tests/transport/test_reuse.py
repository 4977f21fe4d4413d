"""A stream carries one turn after another; none has anything of the one before."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fedsplit.plan import Route
from fedsplit.transport import GrpcServer, LinkError, OpenRequest, grpc_link, grpc_server
from fedsplit.transport.connection import METHOD, Connection
from tests.tiny_split import BLOCKS, Cluster, batches, gpt2, initial

ROUTE = Route.two_tier(BLOCKS, 2)
SPEC = gpt2()


@pytest.fixture
def remote() -> Iterator[Cluster]:
    """Return a cluster reached over gRPC."""
    with Cluster(SPEC, "grpc") as found:
        yield found


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the methods of the streams that are begun from now on."""
    begun: list[str] = []
    stream = Connection.stream

    def counted(self: Connection, method: str, *others: Any) -> Any:
        begun.append(method)
        return stream(self, method, *others)

    monkeypatch.setattr(Connection, "stream", counted)
    return begun


def train(remote: Cluster) -> dict[str, torch.Tensor]:
    """Return the adapters of a turn of two mini-batches from the start."""
    return remote.train(ROUTE, batches(2), initial(SPEC))[1]


def begin(remote: Cluster) -> Any:
    """Return a link with a turn that was entered."""
    token = remote.open(ROUTE, initial(SPEC))["server"]
    link = remote.link("server")
    link.open(OpenRequest(token, ROUTE, 1))
    return link


def test_turns_one_after_another_share_a_stream_and_nothing_else(
    remote: Cluster, streams: list[str]
) -> None:
    first, *others = [train(remote) for _ in range(3)]
    assert streams == [METHOD]
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_turns_at_the_same_time_have_a_stream_each(remote: Cluster, streams: list[str]) -> None:
    links = [begin(remote) for _ in range(3)]
    assert streams == [METHOD] * 3
    for link in links:
        link.close()
    for link in [begin(remote) for _ in range(3)]:
        link.abort()
    assert streams == [METHOD] * 3


@pytest.mark.parametrize("way", ["refused", "aborted"])
def test_a_turn_that_fails_takes_its_stream_with_it(
    remote: Cluster, streams: list[str], way: str
) -> None:
    train(remote)
    if way == "refused":
        with pytest.raises(LinkError, match="no turn waits"):
            remote.link("server").open(OpenRequest("ab" * 16, ROUTE, 1))
    else:
        begin(remote).abort()
    assert streams == [METHOD]
    train(remote)
    assert streams == [METHOD] * 2


def test_the_token_of_the_turn_before_is_worth_nothing(remote: Cluster, streams: list[str]) -> None:
    token = remote.open(ROUTE, initial(SPEC))["server"]
    link = remote.link("server")
    link.open(OpenRequest(token, ROUTE, 1))
    link.close()
    with pytest.raises(LinkError, match="is done"):
        remote.link("server").open(OpenRequest(token, ROUTE, 1))
    assert streams == [METHOD]


def test_a_link_that_has_ended_cannot_harm_the_next_on_its_stream(
    remote: Cluster, streams: list[str]
) -> None:
    first = begin(remote)
    first.close()
    second = begin(remote)
    first.abort()
    second.close()
    assert streams == [METHOD]


@pytest.mark.parametrize("end", [grpc_server, grpc_link])
def test_a_stream_is_idle_for_a_while_only(
    remote: Cluster, streams: list[str], monkeypatch: pytest.MonkeyPatch, end: Any
) -> None:
    monkeypatch.setattr(end, "IDLE_S", 0.2)
    first = train(remote)
    time.sleep(1)
    second = train(remote)
    assert streams == [METHOD] * 2
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("settled", [True, False])
def test_a_server_that_stops_waits_for_no_idle_stream_and_may_be_back(
    remote: Cluster, streams: list[str], settled: bool
) -> None:
    train(remote)
    server = remote._servers["server"]
    if settled:
        time.sleep(0.5)
    started = time.monotonic()
    server.stop(30)
    assert time.monotonic() - started < grpc_server.IDLE_S - 1
    remote._servers["server"] = GrpcServer(remote.stage("server"), server.address)
    train(remote)
    assert streams == [METHOD] * 2
