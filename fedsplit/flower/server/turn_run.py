"""One turn on the server, from its plan to its end."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from fedsplit.errors import NodeLost
from fedsplit.execution import OptimizerSpec, Stage
from fedsplit.execution.status import DONE, FAILED
from fedsplit.flower.server.edges import Assignment
from fedsplit.flower.server.host import StageHost
from fedsplit.flower.server.liveness import StartClock
from fedsplit.flower.server.outcome import TurnOutcome
from fedsplit.flower.tasks import Contact
from fedsplit.models.ranks import at_rank, with_residuals
from fedsplit.patience import Patience
from fedsplit.plan import DEVICE, AdapterWay, Failure, Turn
from fedsplit.transport import LinkStats
from fedsplit.transport.presence import BROKEN, EXPECTED, LEFT

Done: TypeAlias = tuple[dict[str, Tensor], TurnOutcome]
"""Complete adapters, and what the turn did."""


@dataclass(eq=False, kw_only=True)
class TurnRun:
    """A turn under way: where it is held, who is there, when it is lost, what came of it.

    Parameters
    ----------
    turn : Turn
        What was planned.
    seed : int
        The turn's, the same on every tier.
    way : AdapterWay
        How adapters reach the device.
    host : StageHost
        The servers of this process.
    stages : list of (Stage, str)
        Those of its tiers that this process hosts, the last tier first, and its token on each.
    door : Contact or None
        Where the device's link leads; None on a route that never leaves the device.
    assignment : Assignment or None
        At an edge that is a node of its own.
    optimizer : OptimizerSpec or None
        What trains it; None if it evaluates.
    place : int
        Of the turn in the assignment's branch.
    adapters : mapping of str to Tensor, optional
        What it starts from; None while its device is only to get ready.
    presence : str
        Token of the device's presence.
    begun_s : float or None
        When the turn's time came, on `time.monotonic`'s clock.
    result : Done, Failure or None
        What came of it.
    """

    turn: Turn
    seed: int
    way: AdapterWay
    host: StageHost
    stages: list[tuple[Stage, str]]
    door: Contact | None
    assignment: Assignment | None = None
    optimizer: OptimizerSpec | None = None
    place: int = 0
    adapters: Mapping[str, Tensor] | None = None
    presence: str = ""
    begun_s: float | None = None
    result: Done | Failure | None = None
    _discarded: bool = False

    def begin(self, adapters: Mapping[str, Tensor]) -> None:
        """Say that the turn's time has come, and bring it the adapters that it starts from.

        A device that has got ready meanwhile is told where to begin.
        """
        ready = self.adapters is None and self.presence != ""
        self.adapters = adapters = at_rank(adapters, self.turn.rank)
        if self.turn.frozen and self.optimizer is not None:
            self.host.hold(self.turn, adapters)
        for place, (stage, token) in enumerate(self.stages):
            fetched: tuple[str, ...] = ()
            if place == len(self.stages) - 1 and self.way is not AdapterWay.MESSAGE:
                first_here = self.assignment is None
                fetched = self.host.adapter_names(self.turn.route, DEVICE) if first_here else ()
            given = {name: adapters[name] for name in with_residuals(fetched, adapters)}
            stage.supply(token, adapters, given)
        self.begun_s = time.monotonic()
        if ready and self.door is not None:
            words = {"address": self.door.address, "token": self.door.token}
            self.host.attendance.tell(self.presence, words)

    def trouble(self, clock: StartClock, patience: Patience) -> str | None:
        """Return why no answer is to be expected any more, or None."""
        if self.assignment is not None and self.assignment.failure is not None:
            return self.assignment.failure
        attention = self.host.attendance.look(self.presence)
        if attention.state == BROKEN:
            return attention.reason
        if attention.state == EXPECTED:
            return clock.trouble(attention.since_s)
        failed = self._failure()
        if failed is not None or self.begun_s is None:
            return failed
        limit_s = patience.to_start_s if attention.state == LEFT else patience.deadline_s
        late = time.monotonic() > max(attention.since_s, self.begun_s) + limit_s
        return f"no answer within {limit_s:.0f} s" if late else None

    def steps(self) -> int:
        """Return how many mini-batches the turn has been through, as far as the servers know."""
        if self._discarded:
            return 0
        return max((stage.status(token).steps for stage, token in self.stages), default=0)

    def links_over(self) -> bool:
        """Return whether nothing more will come over the links of the turn."""
        if self._discarded or not self.stages:
            return self._discarded
        return all(stage.status(token).state in (DONE, FAILED) for stage, token in self.stages)

    def finish(self) -> dict[str, Tensor]:
        """Return what a turn that is done trained on the servers of this process.

        What its device handed up over its link is among it.

        Raises
        ------
        NodeLost
            If a tier is not done.
        """
        adapters: dict[str, Tensor] = {}
        for stage, token in self.stages:
            status = stage.status(token)
            if status.state != DONE:
                raise NodeLost(f"answered while its turn was {status.state} {status.reason}")
            adapters |= stage.adapters(token)
        if self.optimizer is not None and self.optimizer.keep_state:
            self.host.keep(self.turn.device, self.stages)
        return adapters

    def link_bytes(self) -> dict[str, int]:
        """Return the bytes of the links between servers, a remote edge's once it answered."""
        total = LinkStats()
        for stage, token in () if self._discarded else self.stages:
            total += stage.status(token).stats
        counted = {"backhaul-up": total.up_bytes, "backhaul-down": total.down_bytes}
        return (counted if total != LinkStats() else {}) | self.edge_bytes()

    def edge_bytes(self) -> dict[str, int]:
        """Return the bytes of the link from an edge that is a node, once it has answered."""
        return self.assignment.link_bytes.get(self.place, {}) if self.assignment else {}

    def discard(self) -> None:
        """Forget the turn in this process; a device that still trains it is refused."""
        if self._discarded:
            return
        self._discarded = True
        self.host.close(self.stages)
        if self.presence:
            self.host.attendance.forget(self.presence)

    def _failure(self) -> str | None:
        for stage, token in () if self._discarded else self.stages:
            status = stage.status(token)
            if status.state == FAILED:
                return status.reason
        return None
