"""A grid over workers: every place is used at once, and a worker that dies costs one message."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
from fedsplit.apps.launch.pool import Pool, PoolGrid, receive_worker, work
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedsplit.errors import FedsplitError
from fedsplit.flower.server.liveness import Watcher

App = Callable[[Message, Context], Message]


@contextmanager
def grid(app: App, nodes: int, places: int) -> Iterator[tuple[PoolGrid, list[socket.socket]]]:
    """Yield a grid whose workers are threads, and their ends of the connections."""
    ours, servers = socket.socketpair()
    ends: list[socket.socket] = []

    def root() -> None:
        while (connection := receive_worker(ours)) is not None:
            ends.append(connection.dup())
            threading.Thread(target=work, args=(connection, app), daemon=True).start()

    with ExitStack() as stack:
        stack.enter_context(servers)
        threading.Thread(target=root, daemon=True).start()
        yield PoolGrid(stack.enter_context(Pool(servers, places)), nodes), ends


def asked(grid: PoolGrid) -> list[Message]:
    return [grid.create_message(RecordDict(), "train", node, "1") for node in grid.get_node_ids()]


def reply(message: Message, context: Context) -> Message:
    who = ConfigRecord({key: context.node_config[key] for key in context.node_config})
    return Message(RecordDict({"who": who}), reply_to=message)


def test_every_node_is_asked_as_flower_would_ask_it() -> None:
    with grid(reply, nodes=5, places=2) as (federation, _):
        messages = asked(federation)
        answers = list(federation.send_and_receive(messages, timeout=30))
        assert sorted(int(answer.content["who"]["partition-id"]) for answer in answers) == [
            *range(5)
        ]
        assert {answer.content["who"]["num-partitions"] for answer in answers} == {5}
        assert {answer.metadata.src_node_id for answer in answers} == set(federation.get_node_ids())
        numbers = {answer.metadata.reply_to_message_id for answer in answers}
        assert numbers == {message.metadata.message_id for message in messages}
        assert list(federation.pull_messages(numbers)) == [], "each answer is given once"


def test_all_places_work_at_once_however_few_processors_there_are() -> None:
    places = 2 * ((os.cpu_count() or 1) + 4) + 40
    meeting = threading.Barrier(places)

    def meet(message: Message, context: Context) -> Message:
        meeting.wait(30)
        return reply(message, context)

    with grid(meet, nodes=places, places=places) as (federation, _):
        answers = list(federation.send_and_receive(asked(federation), timeout=60))
    assert len(answers) == places
    assert not any(answer.has_error() for answer in answers)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FedsplitError("rank=0: must be above 0"), "rank=0: must be above 0"),
        (KeyError("a"), "KeyError('a')"),
    ],
)
def test_an_app_that_raises_fails_its_message_in_its_own_words(
    error: Exception, reason: str
) -> None:
    def fail(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise error
        return reply(message, context)

    with grid(fail, nodes=3, places=1) as (federation, ends):
        answers = list(federation.send_and_receive(asked(federation), timeout=30))
    assert [answer.error.reason for answer in answers if answer.has_error()] == [reason]
    assert len(ends) == 1, "the worker lives on"


@pytest.mark.parametrize("at_work", [True, False])
def test_a_worker_that_dies_costs_the_message_it_works_on_and_no_other(at_work: bool) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(message: Message, context: Context) -> Message:
        begun.set()
        go_on.wait(30)
        return reply(message, context)

    with grid(slow, nodes=1, places=1) as (federation, ends):
        if not at_work:
            go_on.set()
        names = list(federation.push_messages(asked(federation)))
        assert begun.wait(30)
        if not at_work:
            wait_for(federation, names)
        ends[0].shutdown(socket.SHUT_RDWR)
        if at_work:
            (answer,) = wait_for(federation, names)
            assert answer.error.reason == "its process ended without a word"
            go_on.set()
        (answer,) = federation.send_and_receive(asked(federation), timeout=30)
        assert not answer.has_error()
        assert len(ends) == 2


def test_it_says_when_a_worker_takes_a_message_and_not_before() -> None:
    go_on, begun = threading.Semaphore(0), list[int]()

    def slow(message: Message, context: Context) -> Message:
        go_on.acquire(timeout=30)
        return reply(message, context)

    with grid(slow, nodes=3, places=1) as (federation, _):
        assert isinstance(federation, Watcher)
        messages = asked(federation)
        for number, message in enumerate(messages):
            federation.when_begun(message, partial(begun.append, number))
        assert begun == []
        names = list(federation.push_messages(messages))
        for number in range(3):
            deadline = time.monotonic() + 30
            while begun != list(range(number + 1)):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            go_on.release()
            wait_for(federation, names)


def test_answers_that_are_late_are_not_waited_for() -> None:
    go_on = threading.Event()

    def slow(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 0:
            go_on.wait(30)
        return reply(message, context)

    with grid(slow, nodes=3, places=3) as (federation, _):
        assert len(list(federation.send_and_receive(asked(federation), timeout=1))) == 2
        go_on.set()


def wait_for(federation: PoolGrid, names: list[str]) -> list[Message]:
    deadline = time.monotonic() + 30
    while not (answers := list(federation.pull_messages(names))):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return answers
