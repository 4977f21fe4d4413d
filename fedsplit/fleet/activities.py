"""The activities of a round, one by one or summed up by turn."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.fleet.schedule import Schedule, stretched
from fedsplit.fleet.stages import BACKHAUL, DOWNLINK, UPLINK, Group, Stage
from fedsplit.fleet.turns import Turns
from fedsplit.fleet.waves import Waves
from fedsplit.plan import DEVICE

Array = NDArray[np.float64]
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
    has_edges: bool,
    detail: bool,
) -> list[Activity]:
    """Return the activities of all turns, in the order of the plan."""
    found: list[tuple[int, list[Activity]]] = []
    for group in groups:
        for row, index in enumerate(group.members):
            rows = _turn_rows(turns, group, schedule, row, int(index))
            entities = [
                _entity(turns, stage, int(node), int(index), has_edges)
                for stage, node in zip(rows.stages, rows.node, strict=True)
            ]
            place = int(turns.branch[index]), int(turns.place[index]), int(turns.member[index])
            make = _each if detail else _summed
            found.append((int(index), make(rows, entities, place)))
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
    numbers = [np.full(len(group.before.stages), -1)]
    numbers += [np.repeat(np.arange(steps), len(group.step.stages))]
    numbers += [np.full(len(group.after.stages), -1)]
    return _Rows(
        (*group.before.stages, *(steps * group.step.stages), *group.after.stages),
        np.concatenate(numbers),
        node,
        end - taken,
        end,
        busy,
        fixed([block.sent for block in blocks]).astype(np.float64),
        column([block.joules for block in blocks]),
    )


def _entity(turns: Turns, stage: Stage, node: int, index: int, has_edges: bool) -> str:
    if stage.kind in (UPLINK, DOWNLINK) or stage.tier == DEVICE:
        return f"device {turns.device[index]}"
    if stage.kind == BACKHAUL:
        return f"edge {turns.edge[index]}"
    return f"edge {node - 1}" if node > 0 else "server"


def _each(rows: _Rows, entities: Sequence[str], place: tuple[int, int, int]) -> list[Activity]:
    columns = (rows.step, rows.start, rows.end, rows.busy, rows.sent, rows.joules)
    values = zip(*(column.tolist() for column in columns), strict=True)
    return [
        Activity(stage.kind, stage.label, entity, *place, *numbers)
        for stage, entity, numbers in zip(rows.stages, entities, values, strict=True)
    ]


def _summed(rows: _Rows, entities: Sequence[str], place: tuple[int, int, int]) -> list[Activity]:
    by_kind: dict[tuple[str, str], list[int]] = {}
    for i, (stage, entity) in enumerate(zip(rows.stages, entities, strict=True)):
        by_kind.setdefault((stage.kind, entity), []).append(i)
    return [
        Activity(
            kind,
            ", ".join(dict.fromkeys(rows.stages[i].label for i in which)),
            entity,
            *place,
            -1,
            float(rows.start[which[0]]),
            float(rows.end[which[-1]]),
            float(rows.busy[which].sum()),
            float(rows.sent[which].sum()),
            float(rows.joules[which].sum()),
        )
        for (kind, entity), which in by_kind.items()
    ]
