"""Many branches over one Flower grid: each is a generator that waits for its own answers only."""

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

_POLL_S = 0.02
_PROGRESS_S = 1.0


@dataclass(frozen=True)
class Call:
    """A message to send, whose answer the branch waits for.

    Parameters
    ----------
    message : Message
        What to send.
    steps : int
        Mini-batches that it stands for, for progress.
    steps_done : callable
        How many of them are done by now.
    broken : callable
        Why no answer is to be expected any more, or None.
    """

    message: Message
    steps: int
    steps_done: Callable[[], int]
    broken: Callable[[], str | None]


@dataclass(frozen=True)
class Await:
    """Something that happens without a message of the branch's own; `ready` says when.

    After `deadline_s`, if there is one, the branch is sent `Lost` in its place.
    """

    ready: Callable[[], bool]
    deadline_s: float | None = None


@dataclass(frozen=True)
class Lost:
    """No answer came; why."""

    reason: str


@dataclass(frozen=True, eq=False)
class Fork:
    """Branches to run side by side with the one that yields it, which goes on at once."""

    branches: "Sequence[Turns]"


Waited = Call | Await | Fork
Answer = Message | Lost | None
Turns = Generator[Waited, Answer, None]
"""A branch: yields what it waits for, is sent the answer (None to an `Await` and a `Fork`)."""


@dataclass
class _Waiting:
    branch: Turns
    what: Call | Await
    since: float
    message_id: str = ""
    broken_since: float | None = None


def drive(
    grid: Grid,
    branches: Sequence[Turns],
    tick: Callable[[], None],
    on_progress: Callable[[int], None],
    last_words_s: float,
    in_flight: int | None = None,
) -> None:
    """Run `branches` side by side to their ends; none waits for another.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    branches : sequence of Turns
        What to run.
    tick : callable
        Called over and over meanwhile.
    on_progress : callable
        Called about once a second with the mini-batches done.
    last_words_s : float
        How long a node whose link broke may still say itself what went wrong.
    in_flight : int, optional
        Messages that may be under way at a time; what would send more begins later, in the order
        in which all would have been sent at once. None: no limit.
    """
    pending = deque(branches)
    waiting: list[_Waiting] = []
    steps_done = 0
    report_due = time.monotonic()

    def advance(branch: Turns, answer: Message | Lost | None, *, fresh: bool = False) -> None:
        try:
            while isinstance(what := branch.send(answer), Fork):
                answer = None
                if fresh:  # it has its turn now, and its children with it
                    pending.extendleft(reversed(what.branches))
                else:
                    pending.extend(what.branches)
        except StopIteration:
            return
        item = _Waiting(branch, what, time.monotonic())
        if isinstance(what, Call):
            (item.message_id,) = grid.push_messages([what.message])
        waiting.append(item)

    def begin() -> None:
        while pending and (
            in_flight is None or sum(item.message_id != "" for item in waiting) < in_flight
        ):
            advance(pending.popleft(), None, fresh=True)

    begin()
    while waiting:
        tick()
        asked = [item.message_id for item in waiting if item.message_id]
        replies = {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages(asked)}
        still, due = [], []
        for item in waiting:
            is_due, answer = _answer(item, replies, last_words_s)
            if is_due:
                due.append((item, answer))
            else:
                still.append(item)
        waiting = still
        for item, answer in due:
            if isinstance(item.what, Call):
                steps_done += item.what.steps
            advance(item.branch, answer)
        begin()
        if time.monotonic() >= report_due:
            report_due = time.monotonic() + _PROGRESS_S
            on_progress(
                steps_done
                + sum(item.what.steps_done() for item in waiting if isinstance(item.what, Call))
            )
        if not due:
            time.sleep(_POLL_S)


def _answer(
    item: _Waiting, replies: dict[str, Message], last_words_s: float
) -> tuple[bool, Message | Lost | None]:
    """Return whether the branch need not wait any longer, and what it is to be sent."""
    now = time.monotonic()
    if isinstance(item.what, Await):
        if item.what.ready():
            return True, None
        limit_s = item.what.deadline_s
        if limit_s is not None and now > item.since + limit_s:
            return True, Lost(f"no answer within {limit_s:.0f} s")
    elif item.message_id in replies:
        return True, replies[item.message_id]
    elif (reason := item.what.broken()) is not None:
        item.broken_since = item.broken_since or now
        if now > item.broken_since + last_words_s:
            return True, Lost(reason)
    return False, None
