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


STRANGER = """
import ray
ray.init(address="{address}")
print("nodes", len(ray.nodes()))
task = ray.remote(num_cpus=0)(lambda: "through")
print("task", ray.get(task.remote(), timeout=60))
"""
# Without this, Ray takes 127.0.0.1 for the address of a network.
HERE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@pytest.mark.slow
def test_flowers_simulation_obeys_only_who_has_its_token(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    run = Running([*tiny_job(tiny_checkpoint, tiny_text), "run.engine=flower"], tmp_path)
    try:
        found = listeners(run)
        assert found
        assert {address for address, _ in found} <= set(LOOPBACK)
        (gcs,) = [process for process in run.processes() if process.name() == "gcs_server"]
        ports = {
            connection.laddr.port
            for connection in gcs.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        }
        (port,) = ports
        token = run.part("root").environ()["RAY_AUTH_TOKEN"]

        def attempt(credentials: dict[str, str]) -> str:
            return subprocess.run(
                [sys.executable, "-c", STRANGER.format(address=f"127.0.0.1:{port}")],
                env={**os.environ, **HERE, **credentials, "HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
            ).stdout

        wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        for credentials in ({}, wrong):
            answer = attempt(credentials)
            assert "nodes" not in answer
            assert "task" not in answer
        assert "nodes 1" in attempt({**wrong, "RAY_AUTH_TOKEN": token}), "the door is there"
        assert run.process.poll() is None
    finally:
        run.end()
