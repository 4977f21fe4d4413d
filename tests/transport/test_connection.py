"""Dialling: on this machine no proxy is in between, elsewhere the user's one is."""

import grpc
import pytest

from fedsplit.transport import Attendance, GrpcServer, Presence
from fedsplit.transport.connection import dial

PROXIES = ("http_proxy", "https_proxy", "grpc_proxy")
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that nobody answers at, for everything."""
    for name in PROXIES:
        monkeypatch.setenv(name, NOBODY)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_this_machine_is_reached_past_a_proxy(host: str) -> None:
    attendance = Attendance()
    token = attendance.expect("device 0")
    with GrpcServer({}, f"{host}:0", attendance=attendance) as server:
        port = server.address.rpartition(":")[2]
        with Presence(f"{host}:{port}", token, "device 0", connect_timeout_s=10):
            assert attendance.look(token).state == "present"


def test_other_machines_are_reached_through_it() -> None:
    with dial("192.0.2.1:80", None, 1.0) as channel:
        call = channel.unary_unary("/any/thing")
        with pytest.raises(grpc.RpcError, match="127.0.0.1:9"):
            call(b"", timeout=10)
