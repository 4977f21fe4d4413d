"""When a node that was sent a task has to come, and who sees that it has."""

import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from flwr.app import Message

from fedsplit.transport import Attendance


@runtime_checkable
class Watcher(Protocol):
    """A grid that starts its nodes itself: it sees when one comes, and answers for one that ends.

    Its nodes need no presence of their own.
    """

    def when_begun(self, message: Message, call: Callable[[], None]) -> None:
        """Have `call` made when a node begins to work on `message`, which is still to be pushed."""


class StartClock:
    """Says which of the nodes that were sent a task should have come by now.

    The clock of a node stands still while there is no room for it: in a simulation, while as many
    nodes are present as there are places, and it starts again whenever one comes. Between machines
    there is always room.

    Parameters
    ----------
    attendance : Attendance
        Who is there.
    start_s : float
        How long a node may take to come.
    places : int or None
        Nodes that can work at once; None if each has a machine of its own.
    """

    def __init__(self, attendance: Attendance, start_s: float, places: int | None) -> None:
        self.start_s = start_s
        self._attendance = attendance
        self._places = places
        self._full_until = 0.0

    def tick(self) -> None:
        """Look who is there; to be called over and over."""
        if self._places is None:
            return
        here = self._attendance.present()
        if len(here) >= self._places:
            self._full_until = time.monotonic()
        elif here:
            self._full_until = max(self._full_until, *(item.since_s for item in here))

    def trouble(self, sent_s: float) -> str | None:
        """Return why a node that was sent its task then is late, or None if it is not."""
        if time.monotonic() > max(sent_s, self._full_until) + self.start_s:
            return f"did not come within {self.start_s:.0f} s"
        return None
