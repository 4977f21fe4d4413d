"""When visits to shared servers begin and end: first come first served, or processor sharing.

A turn is a list of visits, one after the other: it waits `delay` seconds (computing on a device,
sending), then needs `work` seconds of server `node` at full speed. Visits of a turn are consecutive
indices; a `Relay` says when turns start. Both disciplines take O(V log V) for V visits.
"""

import heapq
from array import array
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.fleet.relay import Relay

IntArray = NDArray[np.int64]


# Visits that are served together at least, on average after some trials, or it does not pay.
_LEAST_BATCH, _TRIALS = 64, 16


@dataclass(frozen=True, eq=False)
class Visits:
    """Visits of all turns, arrays of shape ``[V]``.

    Parameters
    ----------
    delay_s : ndarray
        Time from the end of the turn's previous visit, or from its start, to arrival.
    work_s : ndarray
        Service at full speed.
    node : ndarray of int
        Server visited.
    turn : ndarray of int
        Turn of each visit, ascending.
    waits : ndarray of int, optional
        1 for a visit after which its turn waits elsewhere with activations left at the server, -1
        for the one that comes back for them, 0 for any other, as all are by default.
    """

    delay_s: Array
    work_s: Array
    node: IntArray
    turn: IntArray
    waits: IntArray | None = None

    @property
    def n_servers(self) -> int:
        """One more than the largest number of a server."""
        return int(self.node.max(initial=0)) + 1

    def ends(self) -> list[bool]:
        """Return for each visit whether it is its turn's last."""
        last = np.append(np.diff(self.turn) != 0, np.ones(min(len(self.turn), 1), dtype=bool))
        flags: list[bool] = last.tolist()
        return flags

    def arrivals(self, ends: Array, starts: Array) -> Array:
        """Return when each visit arrives if visits end at `ends` and turns start at `starts`."""
        previous = np.concatenate([np.zeros(1), ends[:-1]])
        first = np.flatnonzero(np.diff(self.turn, prepend=-1))
        previous[first] = starts[self.turn[first]]
        return previous + self.delay_s


@dataclass(frozen=True, eq=False)
class Served:
    """When each visit arrived, began and ended; shape ``[V]`` each."""

    arrive_s: Array
    begin_s: Array
    end_s: Array


def first_come_first_served(visits: Visits, relay: Relay, places: int = 1 << 62) -> Served:
    """Serve one visit at a time on each server, in order of arrival (ties: lower turn first).

    Parameters
    ----------
    visits, relay
        Who comes, and when turns start.
    places : int
        How many turns may have activations waiting at a server; further ones queue for a place,
        in order of arrival, before they are served.
    """
    waits = [0] * len(visits.node) if visits.waits is None else visits.waits.tolist()
    if places >= len(relay.visit) or not any(waits):
        waits = [0] * len(waits)
        free, found, events = _in_batches(visits, relay)
    else:
        free, found = [0.0] * visits.n_servers, visits.work_s
        events = [(start + visits.delay_s[first], first) for start, first in relay.begin()]
    delay, work, end = _floats(visits.delay_s), _floats(visits.work_s), _floats(found)
    node, turn, last = visits.node.tolist(), visits.turn.tolist(), visits.ends()
    left = [places] * visits.n_servers
    queues: list[deque[int]] = [deque() for _ in range(visits.n_servers)]
    # (time, visit that arrives), or (time, -1 - server) when a place there is given back.
    heapq.heapify(events)
    while events:
        time, visit = events[0]
        if visit < 0:
            server = -1 - visit
            if not queues[server]:
                left[server] += 1
                heapq.heappop(events)
                continue
            visit = queues[server].popleft()
        else:
            server = node[visit]
            if waits[visit] > 0:
                if left[server] == 0:
                    queues[server].append(visit)
                    heapq.heappop(events)
                    continue
                left[server] -= 1
        start = free[server] if free[server] > time else time
        free[server] = end[visit] = done = start + work[visit]
        if last[visit]:
            heapq.heappop(events)
            for begin, first in relay.leave(turn[visit], done):
                heapq.heappush(events, (begin + delay[first], first))
        else:
            heapq.heapreplace(events, (done + delay[visit + 1], visit + 1))
        if waits[visit] < 0:
            heapq.heappush(events, (done, -1 - server))
    ends = np.array(end)
    arrivals = visits.arrivals(ends, np.array(relay.start_s))
    # Rounding may take the begin a last digit below the arrival.
    return Served(arrivals, np.maximum(ends - visits.work_s, arrivals), ends)


def _in_batches(visits: Visits, relay: Relay) -> tuple[list[float], Array, list[tuple[float, int]]]:
    """Serve visits many at a time for as long as that pays.

    Of the visits that are about to arrive, in order, all can be served at once that arrive before
    any of them leads to another arrival. Returns when servers are free, when visits end (those that
    were served) and what is about to arrive.
    """
    delay, work, node, turn = visits.delay_s, visits.work_s, visits.node, visits.turn
    last = np.array(visits.ends(), dtype=bool)
    # No turn follows one that is the last of its branch.
    goes_on = ~last | np.array(relay.followed(), dtype=bool)[turn]
    free, end = np.zeros(visits.n_servers), work.copy()
    starting = relay.begin()
    coming = np.array([first for _, first in starting], dtype=np.int64)
    due = np.array([start for start, _ in starting]) + delay[coming]
    batches, served = 0, 0
    while len(coming) >= _LEAST_BATCH and served >= _LEAST_BATCH * (batches - _TRIALS):
        order = np.lexsort((coming, due))
        coming, due = coming[order], due[order]
        done = np.empty_like(due)
        for server in range(visits.n_servers):
            here = node[coming] == server
            needed = work[coming[here]]
            before = np.cumsum(needed) - needed
            idle = np.maximum(due[here], free[server]) - before
            done[here] = np.maximum.accumulate(idle) + before + needed
        ahead = np.where(last[coming], 0.0, delay[np.minimum(coming + 1, len(delay) - 1)])
        again = np.where(goes_on[coming], done + ahead, np.inf)
        blocked = due[1:] >= np.minimum.accumulate(again)[:-1]
        n = 1 + int(blocked.argmax()) if blocked.any() else len(due)
        now, ends = coming[:n], done[:n]
        end[now] = ends
        np.maximum.at(free, node[now], ends)
        next_, then = [coming[n:], now[~last[now]] + 1], [due[n:], (ends + ahead[:n])[~last[now]]]
        left = last[now]
        for number, time in zip(turn[now[left]].tolist(), ends[left].tolist(), strict=True):
            for begin, first in relay.leave(number, time):
                next_.append(np.array([first]))
                then.append(np.array([begin + delay[first]]))
        coming, due = np.concatenate(next_), np.concatenate(then)
        batches, served = batches + 1, served + n
    return free.tolist(), end, list(zip(due.tolist(), coming.tolist(), strict=True))


def _floats(values: Array) -> "array[float]":
    """Return a copy that is quick to index and small enough for the processor's caches."""
    return array("d", np.asarray(values, dtype=np.float64).tobytes())


class _SharedServer:
    """A server whose `n` present visits each progress at 1/n of full speed.

    `level` is the work that a visit present since the start would have got so far; a visit that
    arrives at level `v` leaves at level ``v + work``, whoever else comes and goes meanwhile.
    """

    def __init__(self) -> None:
        self.level = 0.0
        self.since = 0.0
        self.version = 0
        self.present: list[tuple[float, int]] = []

    def advance(self, time: float) -> None:
        if self.present:
            self.level += (time - self.since) / len(self.present)
        self.since = time
        self.version += 1

    def next_departure(self) -> float:
        # Rounding may leave the first finish a last digit below the level.
        missing = max(self.present[0][0] - self.level, 0.0)
        return self.since + missing * len(self.present)


def processor_sharing(visits: Visits, relay: Relay) -> Served:
    """Serve all present visits of a server at once, each at an equal share of its speed."""
    delay, work, end = _floats(visits.delay_s), _floats(visits.work_s), _floats(visits.work_s)
    node, turn, last = visits.node.tolist(), visits.turn.tolist(), visits.ends()
    servers = [_SharedServer() for _ in range(max(node, default=0) + 1)]
    # (time, order, visit that arrives or server that a visit leaves, version of the server);
    # departures (order 0) go before arrivals at the same time.
    events: list[tuple[float, int, int, int]] = [
        (start + delay[first], 1, first, 0) for start, first in relay.begin()
    ]
    heapq.heapify(events)
    while events:
        time, arrives, subject, version = heapq.heappop(events)
        if arrives:
            server, number = servers[node[subject]], node[subject]
            server.advance(time)
            heapq.heappush(server.present, (server.level + work[subject], subject))
        else:
            server, number = servers[subject], subject
            if version != server.version:
                continue
            server.advance(time)
            finish, visit = heapq.heappop(server.present)
            server.level = finish
            end[visit] = time
            if last[visit]:
                for begin, first in relay.leave(turn[visit], time):
                    heapq.heappush(events, (begin + delay[first], 1, first, 0))
            else:
                heapq.heappush(events, (time + delay[visit + 1], 1, visit + 1, 0))
        if server.present:
            heapq.heappush(events, (server.next_departure(), 0, number, server.version))
    ends = np.array(end)
    arrivals = visits.arrivals(ends, np.array(relay.start_s))
    return Served(arrivals, arrivals, ends)
