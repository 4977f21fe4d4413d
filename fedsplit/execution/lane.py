"""Who computes when: one computation at a time in a process, one step at a time on a tier."""

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


class FifoLock:
    """A lock that is granted in order of arrival and may be released by any thread."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    def acquire(self) -> None:
        """Wait for those who came before."""
        granted = threading.Event()
        with self._mutex:
            self._queue.append(granted)
            if len(self._queue) == 1:
                granted.set()
        granted.wait()

    def release(self) -> None:
        """Let the next one in; to be called by the holder, once."""
        with self._mutex:
            self._queue.popleft()
            if self._queue:
                self._queue[0].set()
