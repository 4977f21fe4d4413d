"""Computations take turns: in order of arrival, on one thread."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from fedsplit.execution.lane import Places, compute


def _queue_up(places: Places, wanted: Callable[[int], bool], count: int) -> "_Waiting":
    """Return `count` threads that came for a place one after the other."""
    waiting = _Waiting()
    for index in range(count):

        def wait(index: int = index) -> None:
            waiting.outcome[index] = places.take(lambda: wanted(index))
            waiting.order.append(index)
            waiting.done[index].set()

        waiting.done.append(threading.Event())
        threading.Thread(target=wait, daemon=True).start()
        while len(places._queue) < index + 1:
            time.sleep(0.001)
    return waiting


class _Waiting:
    """Who waits, and what came of it."""

    def __init__(self) -> None:
        self.done: list[threading.Event] = []
        self.order: list[int] = []
        self.outcome: dict[int, bool] = {}


def _always(index: int = 0) -> bool:
    return True


def test_places_are_given_in_order_of_arrival_and_given_back_by_anyone() -> None:
    places = Places(2)
    assert places.take(_always)
    assert places.take(_always)
    waiting = _queue_up(places, _always, 5)
    assert waiting.order == []
    for index in range(5):
        places.give_back()
        assert waiting.done[index].wait(5)
        assert waiting.order == list(range(index + 1))
    places.give_back()
    places.give_back()
    assert places.take(_always)


def test_whoever_gives_up_waiting_takes_no_place_and_holds_nobody_up() -> None:
    places = Places(1)
    assert places.take(_always)
    gone: set[int] = set()
    waiting = _queue_up(places, lambda index: index not in gone, 3)
    gone |= {0, 1}
    places.look_again()
    assert waiting.done[0].wait(5)
    assert waiting.done[1].wait(5)
    places.give_back()
    assert waiting.done[2].wait(5)
    assert waiting.outcome == {0: False, 1: False, 2: True}


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
