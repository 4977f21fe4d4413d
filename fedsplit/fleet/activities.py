"""The activities of a round, one by one or summed up by turn."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.fleet.overlap import run_ahead
from fedsplit.fleet.schedule import Schedule, in_steps, repeated_blocks, stretched
from fedsplit.fleet.stages import Group
from fedsplit.fleet.steps import BACKHAUL, DOWNLINK, UPLINK, Stage
from fedsplit.fleet.turns import Turns
from fedsplit.fleet.waves import Waves
from fedsplit.plan import DEVICE

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Activity:
    """Something that an entity does in a round.

    Parameters
    ----------
    kind : str
        "compute", "uplink", "downlink", "backhaul" or "aggregate".
    label : str
        "forward", "backward", "forward+backward", "adapters", ...; several joined by "," when
        summed up.
    entity : str
        "device 3", "edge 0" or "server"; a radio link belongs to its device, a wire to its edge.
    branch, turn : int
        Branch, and turn within it; -1 for what is done for all turns of a wave, or all branches.
    member : int
        Place among the turns of its branch that run at the same time.
    step : int
        Mini-batch; -1 for the exchange of adapters, or summed up.
    start_s, end_s : float
        From when to when, waiting for a server not included (but sharing it is).
    busy_s : float
        Seconds of the whole entity: below ``end_s - start_s`` if it is shared or summed up.
    sent_bytes, energy_j : float
        Bytes and joules.
    """

    kind: str
    label: str
    entity: str
    branch: int
    turn: int
    member: int
    step: int
    start_s: float
    end_s: float
    busy_s: float
    sent_bytes: float
    energy_j: float


@dataclass(frozen=True, eq=False)
class _Rows:
    """The stages of one turn in order; arrays of shape ``[rows]``."""

    stages: Sequence[Stage]
    step: IntArray
    node: IntArray
    start: Array
    end: Array
    busy: Array
    sent: Array
    joules: Array


def expand(
    turns: Turns,
    groups: Iterable[Group],
    schedule: Schedule,
    detail: bool,
) -> list[Activity]:
    """Return the activities of all turns, in the order of the plan."""
    found: list[tuple[int, list[Activity]]] = []
    for group in groups:
        found += (_each if detail else _summed)(turns, group, schedule)
    found.sort(key=lambda item: item[0])
    return [activity for _, activities in found for activity in activities]


def of_chores(waves: Waves, schedule: Schedule) -> list[Activity]:
    """Return the activities around the turns of waves."""
    found = []
    for chore in waves.chores:
        since = (schedule.begin_s if chore.before else schedule.done_s)[chore.wave]
        start_s = float(since) + chore.offset_s
        found.append(
            Activity(
                kind=chore.kind,
                label="adapters" if chore.kind == BACKHAUL else "average adapters",
                entity=f"edge {chore.node - 1}" if chore.node > 0 else "server",
                branch=int(waves.branch[chore.wave]),
                turn=-1,
                member=0,
                step=-1,
                start_s=start_s,
                end_s=start_s + chore.seconds,
                busy_s=chore.seconds,
                sent_bytes=chore.sent_bytes,
                energy_j=chore.joules,
            )
        )
    return found


def _turn_rows(turns: Turns, group: Group, schedule: Schedule, row: int, index: int) -> _Rows:
    steps, n_states = int(turns.steps[index]), group.step.work_s.shape[1]
    state = np.minimum(np.arange(steps), n_states - 1)
    blocks = (group.before, group.step, group.after)
    repeats = (np.zeros(1, dtype=np.int64), state, np.zeros(1, dtype=np.int64))

    def column(values: Sequence[Array]) -> Array:
        return np.concatenate([v[row][r].ravel() for v, r in zip(values, repeats, strict=True)])

    def fixed(values: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
        return np.concatenate(
            [np.tile(v[row], len(r)) for v, r in zip(values, repeats, strict=True)]
        )

    node = fixed([block.node for block in blocks]).astype(np.int64)
    busy = column([block.work_s for block in blocks])
    taken = column([stretched(block, schedule.slowdown) for block in blocks])
    waits = np.zeros_like(taken)
    if schedule.served is not None and schedule.first_visit is not None:
        visits = np.flatnonzero(node >= 0)
        first = schedule.first_visit[index]
        span = slice(first, first + len(visits))
        served = schedule.served
        waits[visits] = served.begin_s[span] - served.arrive_s[span]
        taken[visits] = served.end_s[span] - served.begin_s[span]
    end = schedule.start_s[index] + np.cumsum(waits + taken)
    start = end - taken
    if group.pace.at_once > 1 and steps > 0:
        times = _ahead(turns, group, schedule, np.array([row]))
        last = len(taken) - len(group.after.stages)
        middle = slice(len(group.before.stages), last)
        start[middle], end[middle] = (each[0].ravel() for each in times)
        end[last:] += schedule.end_s[index] - end[-1]
        start[last:] = end[last:] - taken[last:]
    numbers = [np.full(len(group.before.stages), -1)]
    numbers += [np.repeat(np.arange(steps), len(group.step.stages))]
    numbers += [np.full(len(group.after.stages), -1)]
    return _Rows(
        (*group.before.stages, *(steps * group.step.stages), *group.after.stages),
        np.concatenate(numbers),
        node,
        start,
        end,
        busy,
        fixed([block.sent for block in blocks]).astype(np.float64),
        column([block.joules for block in blocks]),
    )


def _ahead(turns: Turns, group: Group, schedule: Schedule, rows: IntArray) -> tuple[Array, Array]:
    """Return when each stage of each step starts and ends where several are under way at once.

    Shape ``[rows, steps, stages]``.
    """
    members, block = group.members[rows], group.step
    steps = turns.steps[members]
    seconds = in_steps(block, schedule.slowdown, turns.steps[group.members])[rows]
    head_s = stretched(group.before, schedule.slowdown)[rows, 0].sum(axis=1)
    begun = (schedule.start_s[members] + head_s)[:, None, None]
    times = None
    if schedule.served is not None and schedule.first_visit is not None:
        visits = np.arange(sum(stage.on_server for stage in block.stages))
        number = np.minimum(np.arange(seconds.shape[1]), steps[:, None] - 1)
        first = schedule.first_visit[members][:, None, None]
        which = first + number[:, :, None] * len(visits) + visits
        times = schedule.served.begin_s[which] - begun, schedule.served.end_s[which] - begun
    starts, ends = run_ahead(block.stages, seconds[:, : steps.max()], group.pace, times)
    return begun + starts, begun + ends


def _each(turns: Turns, group: Group, schedule: Schedule) -> list[tuple[int, list[Activity]]]:
    """Return every activity of the turns of `group`, with the turns' indices."""
    found = []
    for row, index in enumerate(group.members.tolist()):
        rows = _turn_rows(turns, group, schedule, row, index)
        entities = [
            _entity(stage, node, int(turns.device[index]), int(turns.edge[index]))
            for stage, node in zip(rows.stages, rows.node.tolist(), strict=True)
        ]
        place = int(turns.branch[index]), int(turns.place[index]), int(turns.member[index])
        columns = (rows.step, rows.start, rows.end, rows.busy, rows.sent, rows.joules)
        values = zip(*(column.tolist() for column in columns), strict=True)
        activities = [
            Activity(stage.kind, stage.label, entity, *place, *numbers)
            for stage, entity, numbers in zip(rows.stages, entities, values, strict=True)
        ]
        found.append((index, activities))
    return found


def _entity(stage: Stage, node: int, device: int, edge: int) -> str:
    if stage.kind in (UPLINK, DOWNLINK) or stage.tier == DEVICE:
        return f"device {device}"
    if stage.kind == BACKHAUL:
        return f"edge {edge}"
    return f"edge {node - 1}" if node > 0 else "server"


def _summed(turns: Turns, group: Group, schedule: Schedule) -> list[tuple[int, list[Activity]]]:
    """Return one activity for each turn of `group`, entity and kind, with the turns' indices.

    Turns have the same stages, so that all of them are summed up at once; only the first and the
    last mini-batch matter for when something starts and ends.
    """
    parts: list[tuple[int, list[Activity]]] = []
    trains = turns.steps[group.members] > 0
    for rows, has_steps in ((np.flatnonzero(trains), True), (np.flatnonzero(~trains), False)):
        if len(rows):
            parts += _summed_alike(turns, group, schedule, rows, has_steps)
    return parts


def _summed_alike(
    turns: Turns, group: Group, schedule: Schedule, rows: IntArray, has_steps: bool
) -> list[tuple[int, list[Activity]]]:
    blocks = repeated_blocks(group, turns)
    used = [(block, repeats[rows]) for block, repeats in blocks if block is not group.step]
    if has_steps:
        used.insert(1, (group.step, blocks[1][1][rows]))
    stages = [stage for block, _ in used for stage in block.stages]
    begin, end = _first_and_last(turns, group, schedule, rows, has_steps)
    busy, joules = (
        np.concatenate(
            [np.einsum("ms,msn->mn", n, getattr(b, name)[rows]) for b, n in used], axis=1
        )
        for name in ("work_s", "joules")
    )
    sent = np.concatenate([n.sum(axis=1)[:, None] * b.sent[rows] for b, n in used], axis=1)
    node = np.concatenate([b.node[rows] for b, _ in used], axis=1)
    members = group.members[rows]
    columns: list[Iterable[tuple[Any, ...]]] = []
    by_owner: dict[tuple[str, str], list[int]] = {}
    for j, stage in enumerate(stages):
        by_owner.setdefault((stage.kind, stage.tier), []).append(j)
    device, edge = turns.device[members].tolist(), turns.edge[members].tolist()
    for which in by_owner.values():
        first, last = stages[which[0]], which[-1]
        names = [
            _entity(first, n, d, e)
            for n, d, e in zip(node[:, which[0]].tolist(), device, edge, strict=True)
        ]
        label = ", ".join(dict.fromkeys(stages[j].label for j in which))
        figures = [
            begin[:, which[0]],
            end[:, last],
            *(values[:, which].sum(axis=1) for values in (busy, sent, joules)),
        ]
        numbers = zip(*(figure.tolist() for figure in figures), strict=True)
        columns.append([(first.kind, label, n, v) for n, v in zip(names, numbers, strict=True)])
    where: Iterable[tuple[int, int, int]] = zip(
        turns.branch[members].tolist(),
        turns.place[members].tolist(),
        turns.member[members].tolist(),
        strict=True,
    )
    return [
        (index, [Activity(kind, label, name, *place, -1, *v) for kind, label, name, v in row])
        for index, place, row in zip(
            members.tolist(), where, zip(*columns, strict=True), strict=True
        )
    ]


def _first_and_last(
    turns: Turns, group: Group, schedule: Schedule, rows: IntArray, has_steps: bool
) -> tuple[Array, Array]:
    """Return when each stage starts for the first time and ends for the last; ``[rows, stages]``.

    Stages of the mini-batches are left out without `has_steps`.
    """
    members = group.members[rows]
    before, after = (
        stretched(block, schedule.slowdown)[rows, 0] for block in (group.before, group.after)
    )
    pieces = [(before, np.zeros_like(before))], [(before, np.zeros_like(before))]
    if has_steps:
        steps = stretched(group.step, schedule.slowdown)
        last_state = np.minimum(turns.steps[members], steps.shape[1]) - 1
        visits = [j for j, stage in enumerate(group.step.stages) if stage.on_server]
        for piece, state, number in (
            (pieces[0], np.zeros_like(last_state), np.zeros_like(last_state)),
            (pieces[1], last_state, turns.steps[members] - 1),
        ):
            taken, waits = steps[rows, state], np.zeros((len(rows), steps.shape[2]))
            if schedule.served is not None and schedule.first_visit is not None and visits:
                served = schedule.served
                at = schedule.first_visit[members] + number * len(visits)
                here = at[:, None] + np.arange(len(visits))
                waits[:, visits] = served.begin_s[here] - served.arrive_s[here]
                taken[:, visits] = served.end_s[here] - served.begin_s[here]
            piece.append((taken, waits))
    for piece in pieces:
        piece.append((after, np.zeros_like(after)))
    (first, first_waits), (last, last_waits) = (
        tuple(np.concatenate(both, axis=1) for both in zip(*piece, strict=True)) for piece in pieces
    )
    begin = schedule.start_s[members][:, None] + np.cumsum(first + first_waits, axis=1) - first
    span = last + last_waits
    end = schedule.end_s[members][:, None] - (span.sum(axis=1)[:, None] - np.cumsum(span, axis=1))
    if has_steps and group.pace.at_once > 1:
        starts, ends = _ahead(turns, group, schedule, rows)
        middle = slice(len(group.before.stages), begin.shape[1] - len(group.after.stages))
        begin[:, middle] = starts[:, 0]
        end[:, middle] = ends[np.arange(len(rows)), turns.steps[members] - 1]
    # What is done once lies on the other side of mini-batches that were not looked at.
    head, tail = len(group.before.stages), len(group.after.stages)
    end[:, :head] = begin[:, :head] + before
    begin[:, -tail:] = end[:, -tail:] - after
    return begin, end
