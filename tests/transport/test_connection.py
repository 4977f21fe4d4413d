"""Dialling: no proxy is in between on this machine; whoever comes next takes what was kept."""

import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedsplit.transport import Attendance, GrpcServer, Presence, connection
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


def visit(address: str, attendance: Attendance, *, fails: bool = False) -> None:
    """Be present for a task, until the server has its answer."""
    token = attendance.expect("device 0")
    presence = Presence(address, token, "device 0")
    if fails:
        presence.leave("it failed")
    attendance.forget(token)
    while not presence._call.done():
        time.sleep(0.01)
    time.sleep(0.1)  # what is done then is gRPC's thread's to do


def test_a_connection_that_ended_well_is_the_next_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that did not is not; nor does a server that is gone, and there again, hold anybody up."""
    dialled: list[str] = []

    def counted(target: str, *others: Any) -> grpc.Channel:
        dialled.append(target)
        return dial(target, *others)

    monkeypatch.setattr(connection, "dial", counted)
    attendance, address = Attendance(), f"unix:{tmp_path / 'link'}.sock"
    with GrpcServer({}, address, attendance=attendance):  # type: ignore[arg-type]
        for _ in range(3):
            visit(address, attendance)
        assert len(dialled) == 1
        visit(address, attendance, fails=True)
        visit(address, attendance)
        assert len(dialled) == 2
    with GrpcServer({}, address, attendance=attendance):  # type: ignore[arg-type]
        visit(address, attendance)
