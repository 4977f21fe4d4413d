"""Alarms: made once, in time, in order; not made if called off; one thread for all."""

import threading
import time

from fedsplit.transport.alarms import alarm


def test_alarms_go_off_in_time_unless_called_off() -> None:
    heard: list[tuple[str, float]] = []
    begun = time.monotonic()

    def hear(name: str) -> None:
        heard.append((name, time.monotonic() - begun))

    alarm(60.0, lambda: hear("much later"))
    alarm(0.6, lambda: hear("later"))
    off = alarm(0.3, lambda: hear("off"))
    alarm(0.2, lambda: hear("soon"))
    off.cancel()
    off.cancel()
    time.sleep(1.2)
    assert [name for name, _ in heard] == ["soon", "later"]
    for (_, when), due in zip(heard, (0.2, 0.6), strict=True):
        assert when >= due


def test_many_alarms_take_one_thread_and_one_that_fails_no_other() -> None:
    gone_off = threading.Event()
    alarm(0.1, lambda: 1 / 0)
    before = threading.active_count()
    made = [alarm(60.0, gone_off.set) for _ in range(100)]
    assert threading.active_count() == before
    alarm(0.2, gone_off.set)
    assert gone_off.wait(5)
    for each in made:
        each.cancel()
