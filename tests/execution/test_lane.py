"""Computations take turns: in order of arrival, on one thread."""

import threading

import pytest
import torch

from fedsplit.execution.lane import FifoLock, compute


def test_a_lock_is_granted_in_order_of_arrival_and_released_by_anyone() -> None:
    lock = FifoLock()
    lock.acquire()
    order: list[int] = []
    granted = [threading.Event() for _ in range(5)]

    def wait(index: int) -> None:
        lock.acquire()
        order.append(index)
        granted[index].set()

    threads = []
    for index in range(5):
        threads.append(threading.Thread(target=wait, args=(index,)))
        threads[-1].start()
        while len(lock._queue) < index + 2:
            pass
    assert order == []
    for index in range(5):
        lock.release()
        assert granted[index].wait(5)
        assert order == list(range(index + 1))
    lock.release()
    lock.acquire()


def test_computations_share_a_thread_that_is_not_the_callers() -> None:
    found = {compute(threading.get_ident) for _ in range(3)}
    assert len(found) == 1
    assert threading.get_ident() not in found


def test_an_error_reaches_its_caller_and_the_lane_goes_on() -> None:
    with pytest.raises(ZeroDivisionError):
        compute(lambda: 1 / 0)
    assert compute(lambda: 2) == 2


def test_denormals_are_flushed() -> None:
    assert compute(lambda: (torch.full((64,), 1e-30) * 1e-10).count_nonzero().item()) == 0
