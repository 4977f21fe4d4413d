"""Calls that are due later, most of which are called off before: one thread for all of them."""

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import cache

_LOG = logging.getLogger(__name__)


class Alarm:
    """A call that is due; `cancel` calls it off, at any time."""

    def __init__(self, alarms: "_Alarms", due_s: float, call: Callable[[], object]) -> None:
        self._alarms = alarms
        self.due_s = due_s
        self.call = call

    def cancel(self) -> None:
        """Call it off; nothing if it has been made."""
        self._alarms.live.discard(self)


def alarm(after_s: float, call: Callable[[], object]) -> Alarm:
    """Have `call`, which must not block, made in a thread of its own `after_s` seconds from now.

    A `threading.Timer` would start a thread, which costs more than what it watches over.
    """
    return _alarms(os.getpid()).add(after_s, call)


@cache
def _alarms(pid: int) -> "_Alarms":
    return _Alarms()  # keyed by process, because threads do not survive a fork


class _Alarms:
    def __init__(self) -> None:
        self.live: set[Alarm] = set()
        self._changed = threading.Condition()
        self._next_s = float("inf")
        threading.Thread(target=self._watch, name="alarms", daemon=True).start()

    def add(self, after_s: float, call: Callable[[], object]) -> Alarm:
        made = Alarm(self, time.monotonic() + after_s, call)
        with self._changed:
            self.live.add(made)
            if made.due_s < self._next_s:
                self._changed.notify()
        return made

    def _watch(self) -> None:
        while True:
            with self._changed:
                waiting = self.live.copy()
                # An alarm that is called off meanwhile is waited for all the same, once.
                self._next_s = min((item.due_s for item in waiting), default=float("inf"))
                left_s = self._next_s - time.monotonic()
                if left_s > 0:
                    self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
            now = time.monotonic()
            for item in waiting:
                if item.due_s <= now and item in self.live:
                    self.live.discard(item)
                    self._make(item.call)

    @staticmethod
    def _make(call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            _LOG.exception("an alarm failed")
