"""Who computes when: one computation at a time; so many steps that wait in mid-step."""

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


def compute(function: Callable[[], T]) -> T:
    """Run `function` on the process's one compute thread and return its result.

    All tensor work goes through here, in order of arrival. One thread means one pool of math
    threads and one memory arena however many branches there are, and that nothing else draws from
    torch's global random generator meanwhile; what does (loading a model, say) belongs in here
    too, in a process with several threads. `function` must not wait for another computation.
    """
    return _compute_thread(os.getpid()).submit(function).result()


@cache
def _compute_thread(pid: int) -> ThreadPoolExecutor:
    # Keyed by process, because threads do not survive a fork. Denormals slow a backward pass
    # several times; the setting belongs to a thread and those it starts.
    return ThreadPoolExecutor(1, "compute", initializer=torch.set_flush_denormal, initargs=(True,))


class Places:
    """So many places, given out in order of arrival; whoever waits may give up.

    Parameters
    ----------
    count : int
        How many there are.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()

    def take(self, wanted: Callable[[], bool]) -> bool:
        """Wait for those who came before; return whether a place was taken.

        It is not if it is not `wanted` any more, which is asked whenever `look_again` is called.
        """
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            self._changed.wait_for(
                lambda: not wanted() or (self._free > 0 and self._queue[0] is ticket)
            )
            self._queue.remove(ticket)
            taken = wanted()
            self._free -= taken
            self._changed.notify_all()
            return taken

    def give_back(self) -> None:
        """Free a place that was taken."""
        with self._changed:
            self._free += 1
            self._changed.notify_all()

    def look_again(self) -> None:
        """Have all that wait ask whether they still want a place."""
        with self._changed:
            self._changed.notify_all()
