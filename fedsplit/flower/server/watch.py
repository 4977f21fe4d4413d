"""One turn under way: for how long it is waited for, and why it is given up."""

import time
from dataclasses import dataclass

from fedsplit.flower.server.host import StageHost
from fedsplit.flower.server.liveness import StartClock
from fedsplit.flower.server.placement import Seat
from fedsplit.transport.presence import BROKEN, EXPECTED, LEFT


@dataclass
class TurnWatch:
    """One turn under way, and when it is lost.

    Parameters
    ----------
    host : StageHost
        The servers' side.
    clock : StartClock
        When its device has to come.
    presence : str
        Token of the device's presence.
    seat : Seat
        The turn on the servers.
    start_s, deadline_s : float
        How long the answer of a device that has left may be on its way; and how long a device that
        is present may take for its turn.
    begun_s : float or None
        When the turn's time came (`begin`), on `time.monotonic`'s clock; a device that was started
        ahead waits for it.
    """

    host: StageHost
    clock: StartClock
    presence: str
    seat: Seat
    start_s: float
    deadline_s: float
    begun_s: float | None = None

    def begin(self) -> None:
        """Say that the turn's time has come."""
        self.begun_s = time.monotonic()

    def trouble(self) -> str | None:
        """Return why no answer is to be expected any more, or None."""
        opened, ticket = self.seat.opened, self.seat.ticket
        if ticket is not None and ticket.failure is not None:
            return ticket.failure
        attention = self.host.attendance.look(self.presence)
        if attention.state == BROKEN:
            return attention.reason
        if attention.state == EXPECTED:
            late = self.clock.is_late(attention.since_s)
            return f"did not come within {self.start_s:.0f} s" if late else None
        failed = self.host.failure(opened) if opened is not None else None
        if failed is not None or self.begun_s is None:
            return failed
        limit_s = self.start_s if attention.state == LEFT else self.deadline_s
        late = time.monotonic() > max(attention.since_s, self.begun_s) + limit_s
        return f"no answer within {limit_s:.0f} s" if late else None

    def steps(self) -> int:
        """Return how many mini-batches the turn has been through, as far as the servers know."""
        opened = self.seat.opened
        return self.host.steps(opened) if opened is not None else 0
