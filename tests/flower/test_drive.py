"""Branches over one grid: each waits for its own answers; a lost node still has its last words."""

import time
from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedsplit.flower.server.drive import Answer, Await, Call, Fork, Lost, Turns, drive


class Grid:
    """Answers each message so many seconds after it was sent (never: None)."""

    def __init__(self, after_s: float | None) -> None:
        self.after_s = after_s
        self.sent: dict[str, tuple[float, Message]] = {}
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            name = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = name
            self.sent[name] = time.monotonic(), message
            names.append(name)
        return names

    def pull_messages(self, names: Iterable[str]) -> list[Message]:
        now = time.monotonic()
        return [
            Message(RecordDict(), reply_to=self.sent[name][1])
            for name in names
            if self.after_s is not None and now >= self.sent[name][0] + self.after_s
        ]


def call(broken: str | None, steps: int = 1, done: int = 0) -> Call:
    return Call(Message(RecordDict(), 7, "train"), steps, lambda: done, lambda: broken)


def asks(what: Any, answers: list[Answer]) -> Turns:
    answers.append((yield what))


def run(grid: Grid, *branches: Turns, last_words_s: float = 0.5) -> list[int]:
    progress: list[int] = []
    drive(grid, branches, lambda: None, progress.append, last_words_s)  # type: ignore[arg-type]
    return progress


@pytest.mark.parametrize(("after_s", "heard"), [(0.2, True), (None, False), (1.5, False)])
def test_a_node_that_is_gone_may_still_say_why(after_s: float | None, heard: bool) -> None:
    """What it says within its last words counts; after that, what the server knows."""
    answers: list[Answer] = []
    started = time.monotonic()
    run(Grid(after_s), asks(call("its process ended"), answers))
    (answer,) = answers
    assert isinstance(answer, Message) == heard
    if not heard:
        assert answer == Lost("its process ended")
        assert 0.5 <= time.monotonic() - started < 1.5


def test_nobody_waits_for_another() -> None:
    order: list[str] = []

    def slow() -> Turns:
        yield Await(lambda: len(order) == 2)
        order.append("slow")

    def fast(name: str) -> Turns:
        yield call(None)
        order.append(name)

    run(Grid(0.0), slow(), fast("a"), fast("b"))
    assert order == ["a", "b", "slow"]


def test_a_wait_ends_at_its_deadline() -> None:
    answers: list[Answer] = []
    run(Grid(None), asks(Await(lambda: False, 0.2), answers))
    assert answers == [Lost("no answer within 0 s")]


def test_a_fork_goes_on_at_once() -> None:
    order: list[str] = []

    def child() -> Turns:
        yield call(None)
        order.append("child")

    def parent() -> Turns:
        yield Fork([child()])
        order.append("parent")
        yield Await(lambda: "child" in order)

    run(Grid(0.05), parent())
    assert order == ["parent", "child"]


def test_an_error_of_the_servers_own_is_not_a_lost_node() -> None:
    def wrong() -> Turns:
        yield call(None)
        raise KeyError("adapter")

    with pytest.raises(KeyError, match="adapter"):
        run(Grid(0.0), wrong())


def test_progress_counts_what_is_done_and_under_way() -> None:
    answers: list[Answer] = []
    grid = Grid(1.2)
    progress = run(grid, asks(call(None, steps=8, done=3), answers))
    assert progress[0] == 3
    assert progress[-1] in (3, 8)


@pytest.mark.parametrize("in_flight", [1, 3, None])
def test_no_more_messages_are_under_way_than_allowed(in_flight: int | None) -> None:
    """Children of a branch that has just begun are its first messages; nothing is left out."""
    grid, under_way, most, sent = Grid(0.03), [0], [0], list[str]()

    def child(name: str) -> Turns:
        sent.append(name)
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        yield call(None)
        under_way[0] -= 1

    def branch(name: str) -> Turns:
        ended: list[str] = []

        def told(which: str) -> Turns:
            yield from child(which)
            ended.append(which)

        for wave in "12":
            names = [f"{name}{wave}{turn}" for turn in "xy"]
            yield Fork([told(which) for which in names])
            yield Await(lambda names=names: set(names) <= set(ended))  # type: ignore[misc]

    drive(grid, [branch(n) for n in "abc"], lambda: None, lambda _: None, 0.5, in_flight)  # type: ignore[arg-type]
    assert most[0] == (in_flight or 6)
    assert len(sent) == len(set(sent)) == 12
    assert sent[:6] == ["a1x", "a1y", "b1x", "b1y", "c1x", "c1y"]
