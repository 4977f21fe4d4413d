"""Presence: the server learns at once who is at work, who left, and who is gone."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import grpc
import pytest

from fedsplit.errors import FedsplitError
from fedsplit.transport import Attendance, GrpcServer, LinkError, Presence, Visit
from fedsplit.transport.connection import PRESENCE, SERVICE
from fedsplit.transport.frames import Frame, Kind, Limits, decode, encode

WHO = "device 3, round 1"
PING_S = 0.5
# Processes that never knew gRPC before: a fork of one that does would not be whole.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fedsplit.transport"])


class Nowhere:
    """A host without turns."""

    def enter(self, token: bytes) -> Visit:
        raise LinkError("token: no turn waits for it")


class Desk:
    """A server that only keeps presence."""

    def __init__(self, folder: Path) -> None:
        self.attendance = Attendance()
        self.server = GrpcServer(
            Nowhere(), f"unix:{folder}/s", attendance=self.attendance, ping_s=PING_S
        )

    def come(self, token: str, who: str = WHO) -> Presence:
        """Come as a node does."""
        return Presence(self.server.address, token, who, ping_s=PING_S)

    def reaches(self, token: str, state: str, within_s: float) -> float:
        """Wait until the bearer is in `state`; return the seconds it took."""
        started = time.monotonic()
        while self.attendance.look(token).state != state:
            assert time.monotonic() < started + within_s, self.attendance.look(token)
            time.sleep(0.01)
        return time.monotonic() - started


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """Return a server of its own."""
    found = Desk(tmp_path)
    yield found
    found.server.stop()


def test_a_node_comes_and_leaves_in_good_order(desk: Desk) -> None:
    token = desk.attendance.expect(WHO)
    assert desk.attendance.look(token).state == "expected"
    presence = desk.come(token)
    assert desk.attendance.look(token).state == "present"
    presence.leave()
    assert desk.attendance.look(token).state == "left"
    presence.leave()


def test_a_task_that_fails_says_why_at_once(desk: Desk) -> None:
    token = desk.attendance.expect(WHO)
    with pytest.raises(ValueError, match="no room"), desk.come(token):
        raise ValueError("no room")
    assert desk.attendance.look(token).state == "broken"
    assert desk.attendance.look(token).reason == "no room"


def test_a_task_that_ends_well_stays_present_until_its_answer_is_there(desk: Desk) -> None:
    token = desk.attendance.expect(WHO)
    before = threading.active_count()
    with desk.come(token) as presence:
        pass
    assert desk.attendance.look(token).state == "present"
    desk.attendance.forget(token)
    with pytest.raises(LinkError, match="nobody is expected"):
        desk.attendance.look(token)
    with pytest.raises(LinkError):
        presence.wait_for_words(5)
    for _ in range(20):
        token = desk.attendance.expect(WHO)
        desk.come(token)
        desk.attendance.forget(token)
    deadline = time.monotonic() + 5
    while threading.active_count() > before + 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before + 3, "streams that ended hold no threads"


def test_words_arrive_in_order_even_if_told_before_the_node_came(desk: Desk) -> None:
    token = desk.attendance.expect(WHO)
    desk.attendance.tell(token, {"count": [1, 2]})
    with desk.come(token) as presence:
        desk.attendance.tell(token, {"count": []})
        assert presence.wait_for_words(5) == {"count": [1, 2]}
        assert presence.wait_for_words(5) == {"count": []}
        threading.Timer(0.2, desk.attendance.tell, (token, {"go": True})).start()
        assert presence.wait_for_words(5) == {"go": True}
    with pytest.raises(FedsplitError, match="must be <="):
        desk.attendance.tell(token, {"much": "x" * 100_000})


def test_a_node_that_waits_in_vain_gives_up(desk: Desk) -> None:
    token = desk.attendance.expect(WHO)
    with pytest.raises(LinkError, match=r"no answer within 0\.2 s"), desk.come(token) as presence:
        presence.wait_for_words(0.2)
    desk.reaches(token, "broken", 5)


def test_a_token_opens_once_and_for_its_own_node_only(desk: Desk) -> None:
    token = desk.attendance.expect(WHO)
    with pytest.raises(LinkError, match="must be 'device 3, round 1'"):
        desk.come(token, "device 4, round 1")
    with pytest.raises(LinkError, match="nobody is expected"):
        desk.come("ab" * 16)
    desk.come(token)
    with pytest.raises(LinkError, match="opens only once"):
        desk.come(token)
    assert desk.attendance.look(token).state == "present", "undisturbed by the second"


def test_whom_the_server_sees_itself_needs_no_stream_and_gets_no_second_one(desk: Desk) -> None:
    token = desk.attendance.expect(WHO)
    desk.attendance.come(token)
    assert [seat.state for seat in desk.attendance.present()] == ["present"]
    with pytest.raises(LinkError, match="opens only once"):
        desk.come(token)
    desk.attendance.forget(token)
    desk.attendance.come(token)
    assert desk.attendance.present() == []


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0" * 48,
        encode(Frame(Kind.CLOSE, 0, bytes(16))),
        encode(Frame(Kind.PRESENT, 0, bytes(16), {"who": 3})),
        encode(Frame(Kind.PRESENT, 0, bytes(16), {"who": "x" * 40_000})),
        encode(Frame(Kind.LEAVE, 0, bytes(16), {"reason": ""})),
    ],
    ids=["empty", "zeros", "kind", "type", "long", "stranger leaves"],
)
def test_what_is_no_proper_greeting_is_refused(desk: Desk, frame: bytes) -> None:
    with grpc.insecure_channel(desk.server.address) as channel:
        stream = channel.stream_stream(f"/{SERVICE}/{PRESENCE}")
        (answer,) = list(stream(iter([frame]), timeout=10))
    number = 0
    refusal = decode(answer, Limits(), kinds=[Kind.ERROR], number=number, token=bytes(16))
    assert refusal.fields["reason"]


def test_a_server_without_attendance_has_no_such_method(tmp_path: Path) -> None:
    with (
        GrpcServer(Nowhere(), f"unix:{tmp_path}/s") as server,
        pytest.raises(LinkError, match="UNIMPLEMENTED"),
    ):
        Presence(server.address, "ab" * 16, WHO)


def _work(address: str, token: str, what: str, pipe: Connection) -> None:
    with Presence(address, token, WHO, ping_s=PING_S):
        pipe.send("here")
        if what == "compute":
            ctypes.PyDLL(None).sleep(3)  # one long call that never lets another Python thread run
            pipe.send("done")
        if what == "end":
            atexit._run_exitfuncs()  # as Python does at its end, but not in multiprocessing
        else:
            time.sleep(600)


def _node(desk: Desk, token: str, what: str) -> tuple[BaseProcess, Connection]:
    here, there = PROCESSES.Pipe()
    node = PROCESSES.Process(target=_work, args=(desk.server.address, token, what, there))
    node.start()
    assert here.recv() == "here"
    return node, here


@pytest.mark.parametrize(
    ("strike", "within_s"),
    [
        (lambda pid: os.kill(pid, signal.SIGKILL), 1.0),
        (lambda pid: os.kill(pid, signal.SIGSTOP), 3 * PING_S + 1.5),
    ],
    ids=["kill", "freeze"],
)
def test_a_process_that_is_gone_is_noticed(
    desk: Desk, strike: Callable[[int], None], within_s: float
) -> None:
    token = desk.attendance.expect(WHO)
    node, _ = _node(desk, token, "stay")
    try:
        time.sleep(4 * PING_S)
        assert desk.attendance.look(token).state == "present", "while it only waits"
        assert node.pid is not None
        strike(node.pid)
        desk.reaches(token, "broken", within_s)
        assert "hangs or was cut off" in desk.attendance.look(token).reason
    finally:
        node.kill()
        node.join()


def test_a_process_that_only_computes_is_not_taken_for_gone(desk: Desk) -> None:
    token = desk.attendance.expect(WHO)
    node, pipe = _node(desk, token, "compute")
    try:
        assert pipe.recv() == "done"
        assert desk.attendance.look(token).state == "present", "after six pings' time"
    finally:
        node.kill()
        node.join()


def test_a_process_that_ends_leaves_in_good_order(desk: Desk) -> None:
    token = desk.attendance.expect(WHO)
    node, _ = _node(desk, token, "end")
    node.join(20)
    assert node.exitcode == 0
    desk.reaches(token, "left", 5)
