"""When turns start and end: a closed form where no server is contended for, else a simulation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.fleet.fleet import ServingSpec
from fedsplit.fleet.overlap import run_ahead
from fedsplit.fleet.queues import Served, Visits, first_come_first_served, processor_sharing
from fedsplit.fleet.relay import Relay
from fedsplit.fleet.stages import Block, Group
from fedsplit.fleet.turns import Turns
from fedsplit.fleet.waves import Waves

IntArray = NDArray[np.int64]


# What a visit does to the activations that wait at its server (`Visits.waits`).
_WAITS = {"forward": 1, "backward": -1, "forward+backward": 0}


@dataclass(frozen=True, eq=False, kw_only=True)
class Schedule:
    """When turns start and end.

    Parameters
    ----------
    start_s, end_s : ndarray
        Shape ``[T]``.
    begin_s, done_s : ndarray
        When its branch comes to each wave, and when the last turn of each ends, shape ``[W]``.
    waiting_s : float
        Time in servers beyond the work done there, over all turns.
    slowdown : ndarray
        Factor by which a visit to each server takes longer than its work, where that is fixed.
    served, first_visit
        Visits to contended servers, and where each turn's begin among them (-1: it makes none);
        None without contention.
    """

    start_s: Array
    end_s: Array
    begin_s: Array
    done_s: Array
    waiting_s: float
    slowdown: Array
    served: Served | None = None
    first_visit: IntArray | None = None


def step_repeats(steps: IntArray, n_states: int) -> Array:
    """Return how many of each turn's steps see each channel state, shape ``[T, states]``.

    State `i` holds for step `i`, the last one for all steps that remain.
    """
    repeats = (np.arange(n_states) < steps[:, None]).astype(np.float64)
    repeats[:, -1] = np.maximum(steps - (n_states - 1), 0)
    return repeats


def repeated_blocks(group: Group, turns: Turns) -> tuple[tuple[Block, Array], ...]:
    """Return the blocks of a turn in order, with how often each channel state's is run."""
    once = np.ones((len(group.members), 1))
    steps = step_repeats(turns.steps[group.members], group.step.work_s.shape[1])
    return (group.before, once), (group.step, steps), (group.after, once)


def stretched(block: Block, slowdown: Array) -> Array:
    """Return the seconds that each stage takes, ``[M, states, stages]``."""
    # Node -1 (no server) picks the appended 1.
    seconds: Array = block.work_s * np.append(slowdown, 1.0)[block.node][:, None, :]
    return seconds


def in_steps(block: Block, slowdown: Array, steps: IntArray) -> Array:
    """Return the seconds that each stage of each step takes, 0 beyond a turn's last step.

    Shape ``[M, steps, stages]``, of the most steps of any turn.
    """
    seconds = stretched(block, slowdown)
    numbers = np.arange(steps.max(initial=0))
    every: Array = seconds[:, np.minimum(numbers, seconds.shape[1] - 1)]
    return np.where((numbers < steps[:, None])[:, :, None], every, 0.0)


def schedule(
    turns: Turns, waves: Waves, groups: Sequence[Group], serving: ServingSpec, n_servers: int
) -> Schedule:
    """Return when the turns of a round run.

    Parameters
    ----------
    turns : Turns
        The turns.
    waves : Waves
        What is done between them.
    groups : sequence of Group
        Their stages.
    serving : ServingSpec
        How servers divide themselves.
    n_servers : int
        Number of servers.
    """
    users = _users_of_servers(turns, groups, n_servers)
    slowdown = np.ones(n_servers)
    if serving.discipline == "partition":
        slowdown = np.maximum(users, 1).astype(np.float64)
    elif serving.discipline != "unlimited" and users.max() > 1:
        return _contended(turns, waves, groups, serving, n_servers)
    duration = np.zeros(len(turns.device))
    waiting = 0.0
    for group in groups:
        for block, repeats in repeated_blocks(group, turns):
            taken = np.einsum("ms,msn->m", repeats, stretched(block, slowdown))
            waiting += float(taken.sum() - np.einsum("ms,msn->", repeats, block.work_s))
            if block is group.step and group.pace.at_once > 1:
                every = in_steps(block, slowdown, turns.steps[group.members])
                _, ends = run_ahead(block.stages, every, group.pace)
                taken = ends.max(axis=(1, 2), initial=0.0)
            duration[group.members] += taken
    nowhere = np.full(len(duration), -1)
    relay = _relay(waves, duration, np.zeros_like(duration), nowhere)
    relay.begin()
    return Schedule(**_times(relay), waiting_s=waiting, slowdown=slowdown)


def _users_of_servers(turns: Turns, groups: Sequence[Group], n_servers: int) -> IntArray:
    """Return how many turns may be at each server at a time."""
    visits = set()
    for group in groups:
        for j, stage in enumerate(group.step.stages):
            if stage.on_server:
                pairs = np.stack([turns.slot[group.members], group.step.node[:, j]], axis=1)
                visits |= set(map(tuple, np.unique(pairs, axis=0).tolist()))
    return np.bincount([node for _, node in visits], minlength=n_servers)


def _relay(waves: Waves, alone: Array, trail: Array, first_visit: IntArray) -> Relay:
    columns = (waves.branch, waves.first, waves.before_s, waves.after_s, alone, trail, first_visit)
    return Relay(*(column.tolist() for column in columns))


def _times(relay: Relay) -> dict[str, Any]:
    names = ("start_s", "end_s", "begin_s", "done_s")
    return {name: np.array(getattr(relay, name)) for name in names}


def _contended(
    turns: Turns, waves: Waves, groups: Sequence[Group], serving: ServingSpec, n_servers: int
) -> Schedule:
    """Run the turns through their servers' queues.

    Stages between two visits to a server take fixed time, so only visits become events. A turn is
    its visits with their delays, and `trail` seconds; one without any visit (a device-only route,
    or no steps) takes `alone` seconds.
    """
    n_turns = len(turns.device)
    alone, trail = np.zeros(n_turns), np.zeros(n_turns)
    n_visits = np.zeros(n_turns, dtype=np.int64)
    parts: list[tuple[IntArray, Array, Array, IntArray, IntArray]] = []
    for group in groups:
        members, steps = group.members, turns.steps[group.members]
        served = [j for j, stage in enumerate(group.step.stages) if stage.on_server]
        before, after = group.before.work_s.sum(axis=(1, 2)), group.after.work_s.sum(axis=(1, 2))
        repeats = step_repeats(steps, group.step.work_s.shape[1])
        alone[members] = before + np.einsum("ms,msn->m", repeats, group.step.work_s) + after
        if not served:
            continue
        n_visits[members] = steps * len(served)
        # One row per step of each turn; the last channel state holds for all later steps.
        row = np.repeat(np.arange(len(members)), steps)
        number = np.arange(len(row)) - np.repeat(np.cumsum(steps) - steps, steps)
        state = np.minimum(number, group.step.work_s.shape[1] - 1)
        work = group.step.work_s[row, state]
        delay = np.stack(
            [
                work[:, start:stop].sum(axis=1)
                for start, stop in zip([0, *[j + 1 for j in served[:-1]]], served, strict=True)
            ],
            axis=1,
        )
        rest = work[:, served[-1] + 1 :].sum(axis=1)
        if group.pace.at_once > 1:
            # As long as no visit has to queue; one that has leaves the device time to catch up.
            every = in_steps(group.step, np.ones(n_servers), steps)
            begin, end = run_ahead(group.step.stages, every, group.pace)
            here = np.arange(every.shape[1]) < steps[:, None]
            delay[:, 0] = begin[:, :, served[0]][here]
            rest = -end[:, :, served[-1]][here]
            rest[np.cumsum(steps)[steps > 0] - 1] += end.max(axis=(1, 2), initial=0.0)[steps > 0]
        # What follows a step's last visit delays the next step's first; adapters come before all.
        delay[1:, 0] += np.where(number[1:] > 0, rest[:-1], 0.0)
        delay[:, 0] += np.where(number == 0, before[row], 0.0)
        some = steps > 0
        trail[members[some]] = after[some] + rest[np.cumsum(steps)[some] - 1]
        parts.append(
            (
                np.repeat(members[row], len(served)),
                delay.ravel(),
                work[:, served].ravel(),
                group.step.node[row][:, served].ravel(),
                np.tile([_WAITS[group.step.stages[j].label] for j in served], len(row)),
            )
        )
    turn_of = np.concatenate([part[0] for part in parts])
    delay, work, node, waits = (np.concatenate([part[i] for part in parts]) for i in (1, 2, 3, 4))
    if len(parts) > 1:
        order = np.argsort(turn_of, kind="stable")
        turn_of, delay, work, node, waits = (
            values[order] for values in (turn_of, delay, work, node, waits)
        )
    first_visit = np.where(n_visits > 0, np.cumsum(n_visits) - n_visits, -1)
    relay = _relay(waves, alone, trail, first_visit)
    visits = Visits(delay, work, node.astype(np.int64), turn_of, waits.astype(np.int64))
    if serving.discipline == "fifo":
        served_visits = first_come_first_served(visits, relay, serving.waiting_steps)
    else:
        served_visits = processor_sharing(visits, relay)
    inside = served_visits.end_s - served_visits.arrive_s
    waiting = float(inside.sum() - work.sum())
    return Schedule(
        **_times(relay),
        waiting_s=waiting,
        slowdown=np.ones(n_servers),
        served=served_visits,
        first_visit=first_visit,
    )
