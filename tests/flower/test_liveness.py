"""When a node has to come: its clock stands still while there is no room for it."""

import time
from types import SimpleNamespace

import pytest

from fedsplit.flower.server import liveness
from fedsplit.flower.server.liveness import StartClock

START_S = 10.0


class Clock:
    """The time, and who is there since when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.here: list[float] = []
        monkeypatch.setattr(liveness, "time", SimpleNamespace(monotonic=lambda: self.now))

    def present(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(since_s=since) for since in self.here]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def late(start: StartClock, sent_s: float) -> bool:
    start.tick()
    return start.trouble(sent_s) is not None


def test_where_each_has_a_machine_nobody_is_waited_for_longer(clock: Clock) -> None:
    start = StartClock(clock, START_S, places=None)  # type: ignore[arg-type]
    clock.here = [clock.now] * 50
    assert not late(start, clock.now)
    clock.now += START_S
    assert not late(start, clock.now - START_S), "exactly so long is allowed"
    clock.now += 0.1
    assert late(start, clock.now - START_S - 0.1)
    assert start.trouble(0.0) == "did not come within 10 s"


def test_while_all_places_are_taken_the_clock_stands_still(clock: Clock) -> None:
    start = StartClock(clock, START_S, places=2)  # type: ignore[arg-type]
    sent = clock.now
    clock.here = [sent, sent]
    for _ in range(5):
        clock.now += START_S
        assert not late(start, sent)
    clock.here = []
    clock.now += START_S - 1
    assert not late(start, sent), "it runs from when a place was free"
    clock.now += 2
    assert late(start, sent)


def test_it_starts_again_when_a_node_comes_to_the_place(clock: Clock) -> None:
    start = StartClock(clock, START_S, places=2)  # type: ignore[arg-type]
    sent = clock.now
    clock.now += START_S - 1
    clock.here = [clock.now]
    assert not late(start, sent)
    clock.now += START_S - 1
    assert not late(start, sent)
    clock.now += 2
    assert late(start, sent)
    assert time.monotonic() != clock.now
