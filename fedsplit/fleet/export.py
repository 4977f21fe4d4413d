"""A timeline as a file: Chrome trace (opens in Perfetto), Gantt chart, JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fedsplit.figures import COLOURS, HATCHES, PAGE_IN, figure, legend
from fedsplit.fleet.activities import Activity
from fedsplit.fleet.timeline import RoundCost, Timeline

_KINDS = ("compute", "uplink", "downlink", "backhaul", "aggregate")
_LOOKS = {
    kind: {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
    for kind, colour, hatch in zip(_KINDS, COLOURS, HATCHES, strict=False)
}
MAX_GANTT_ROWS = 60


def _lane(activity: Activity) -> str:
    """Return the row of an entity that an activity is drawn on, so that rows never overlap."""
    if activity.entity.startswith("device") or activity.branch < 0:
        return activity.kind
    member = f".{activity.member}" if activity.member else ""
    return f"{activity.kind}, branch {activity.branch}{member}"


def cost_record(cost: RoundCost) -> dict[str, Any]:
    """Return a round's totals as plain numbers and lists, for JSON."""
    values = {item.name: getattr(cost, item.name) for item in fields(cost)}
    plain = {name: v if isinstance(v, float) else v.tolist() for name, v in values.items()}
    return {**plain, "energy_j": cost.energy_j}


def write_json(line: Timeline, path: str | Path, detail: bool = False) -> None:
    """Write totals and activities as one JSON object with the keys ``cost`` and ``activities``.

    Parameters
    ----------
    line : Timeline
        The round.
    path : str or Path
        File to write.
    detail : bool
        As in `Timeline.activities`.
    """
    record = {
        "cost": cost_record(line.cost),
        "activities": [asdict(activity) for activity in line.activities(detail)],
    }
    Path(path).write_text(json.dumps(record) + "\n", encoding="utf-8")


def write_chrome_trace(line: Timeline, path: str | Path, detail: bool = False) -> None:
    """Write the timeline in Chrome's trace-event format, for https://ui.perfetto.dev.

    Every entity is a process, every row of it a thread; times are in microseconds. Parameters as
    in `write_json`.
    """
    activities = line.activities(detail)
    processes: dict[str, int] = {}
    threads: dict[tuple[str, str], int] = {}
    events: list[dict[str, Any]] = []
    for activity in activities:
        entity, lane = activity.entity, _lane(activity)
        if entity not in processes:
            processes[entity] = len(processes) + 1
            events.append(_name("process_name", entity, processes[entity], 0))
        if (entity, lane) not in threads:
            threads[entity, lane] = len(threads) + 1
            events.append(_name("thread_name", lane, processes[entity], threads[entity, lane]))
        events.append(
            {
                "name": activity.label,
                "cat": activity.kind,
                "ph": "X",
                "ts": 1e6 * activity.start_s,
                "dur": 1e6 * (activity.end_s - activity.start_s),
                "pid": processes[entity],
                "tid": threads[entity, lane],
                "args": {
                    "branch": activity.branch,
                    "turn": activity.turn,
                    "step": activity.step,
                    "busy_s": activity.busy_s,
                    "sent_bytes": activity.sent_bytes,
                    "energy_j": activity.energy_j,
                },
            }
        )
    record = {"traceEvents": events, "displayTimeUnit": "ms"}
    Path(path).write_text(json.dumps(record) + "\n", encoding="utf-8")


def _name(what: str, name: str, process: int, thread: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def write_gantt(line: Timeline, path: str | Path, detail: bool = False) -> None:
    """Draw the timeline as a Gantt chart, one row per entity and kind of activity.

    Rows beyond `MAX_GANTT_ROWS` are left out, and the title says so. Parameters as in
    `write_json`; the suffix of `path` decides the format.
    """
    rows: dict[tuple[str, str], list[Activity]] = {}
    for activity in line.activities(detail):
        rows.setdefault((activity.entity, _lane(activity)), []).append(activity)
    shown = sorted(rows, key=_row_order)[:MAX_GANTT_ROWS]
    with figure(path, width_in=PAGE_IN, height_in=1.0 + 0.16 * len(shown)) as (_, axes):
        for height, key in enumerate(shown):
            spans = [(a.start_s, a.end_s - a.start_s) for a in rows[key]]
            axes.broken_barh(spans, (height - 0.4, 0.8), **_LOOKS[rows[key][0].kind])
        axes.set_yticks(range(len(shown)), [f"{entity}: {lane}" for entity, lane in shown])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        left_out = f", first {len(shown)} of {len(rows)} rows" if len(shown) < len(rows) else ""
        used: Sequence[str] = sorted({rows[key][0].kind for key in shown})
        for kind in used:
            axes.broken_barh([], (0, 0), label=kind, **_LOOKS[kind])
        legend(axes)
        axes.set_xlabel(f"modelled time (s), of a round {line.cost.delay_s:.4g} s{left_out}")


def _row_order(key: tuple[str, str]) -> tuple[str, int, str]:
    """Sort devices by number, then edges, then the server."""
    name, _, number = key[0].partition(" ")
    return name, int(number or 0), key[1]
