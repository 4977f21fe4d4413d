"""While a run goes on, nobody without its credentials gets a task, an app or a message through."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsplit.transport import LinkError, Presence
from tests.system.running import Running, tiny_job

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


@pytest.fixture(scope="module")
def running(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    run = Running(tiny_job(tiny_checkpoint, tiny_text), tmp_path_factory.mktemp("doors"))
    yield run
    run.end()


def listeners(run: Running) -> list[tuple[str, int]]:
    """Return the addresses on any network at which processes of the run listen."""
    return [
        (connection.laddr.ip, connection.laddr.port)
        for process in (*run.processes(), run.part("command"))
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def sockets(run: Running) -> set[Path]:
    """Return the Unix sockets that have a path, of processes of the run."""
    return {
        Path(connection.laddr)
        for process in run.processes()
        for connection in process.net_connections(kind="unix")
        if connection.laddr
    }


def test_a_run_listens_on_no_network(running: Running) -> None:
    assert len(running.processes()) >= 3, "root, server, a device"
    assert listeners(running) == []


def test_its_sockets_lie_where_only_its_user_gets(running: Running) -> None:
    (link,) = sockets(running)
    closed = [stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0 for folder in link.parents]
    assert any(closed)


def test_whoever_reaches_the_link_needs_a_token(running: Running) -> None:
    (link,) = sockets(running)
    reached = running.rounds()
    for token in ("00" * 16, "ff" * 16):
        with pytest.raises(LinkError):
            Presence(f"unix:{link}", token, "device 0", connect_timeout_s=2.0)
    assert running.rounds() >= reached
    assert running.process.poll() is None


RAY_TASK = """
import ray
ray.init(address="{address}", ignore_reinit_error=True)
print("got", ray.get(ray.remote(lambda: "through").remote(), timeout=20))
"""
RAY_COUNT = """
import ray
ray.init(address="{address}")
print("got", len(ray.nodes()))
"""


@pytest.mark.slow
def test_flowers_simulation_obeys_only_who_has_its_token(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    run = Running([*tiny_job(tiny_checkpoint, tiny_text), "run.engine=flower"], tmp_path)
    try:
        found = listeners(run)
        assert found
        assert {address for address, _ in found} <= set(LOOPBACK)
        (port,) = {
            word.rpartition("=")[2]
            for process in run.processes()
            if "gcs_server" in process.name()
            for word in process.cmdline()
            if word.startswith("--gcs_server_port=")
        }
        address = f"127.0.0.1:{port}"
        for script in (RAY_TASK, RAY_COUNT):
            for stranger in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
                tried = subprocess.run(
                    [sys.executable, "-c", script.format(address=address)],
                    env={**os.environ, **stranger, "HOME": str(tmp_path)},
                    capture_output=True,
                    text=True,
                    timeout=120,
                    check=False,
                )
                assert tried.returncode != 0
                assert "got" not in tried.stdout
        assert run.process.poll() is None
    finally:
        run.end()
