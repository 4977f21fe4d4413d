"""What ``fedsplit plan`` leaves behind: a table to read, and files to go on with."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedsplit.figures import COLOURS, HATCHES, PAGE_IN, figure, legend
from fedsplit.fleet import Fleet, RoundCost
from fedsplit.plan import RoundPlan
from fedsplit.report import plain_text

Results = Mapping[str, Sequence["RoundRow"]]
MAX_BARS = 40


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """What one planned round costs, summed over devices and servers; peaks are the largest.

    `waiting_s` is time in servers' queues; `server_compute_j` is of servers' processors without
    their radios; memory is of all servers together and of the cloud, or the only server; the last
    two count machines with too little of it.
    """

    round: int
    branches: int
    delay_s: float
    waiting_s: float
    device_energy_j: float
    server_energy_j: float
    server_compute_j: float
    uplink_bytes: float
    downlink_bytes: float
    backhaul_bytes: float
    device_peak_bytes: float
    server_peak_bytes: float
    server_memory_bytes: float
    cloud_memory_bytes: float
    devices_over_memory: int
    servers_over_memory: int


def round_row(server_round: int, plan: RoundPlan, cost: RoundCost, fleet: Fleet) -> RoundRow:
    """Return what `cost` says of a round as one row."""
    devices, servers = fleet.devices, fleet.servers
    return RoundRow(
        round=server_round,
        branches=len(plan.branches),
        delay_s=cost.delay_s,
        waiting_s=cost.waiting_s,
        device_energy_j=float(cost.device_energy_j.sum()),
        server_energy_j=float(cost.server_energy_j.sum()),
        server_compute_j=float(cost.server_compute_j.sum()),
        uplink_bytes=float(cost.uplink_bytes.sum()),
        downlink_bytes=float(cost.downlink_bytes.sum()),
        backhaul_bytes=float(cost.backhaul_bytes.sum()),
        device_peak_bytes=float(cost.device_memory_bytes.max()),
        server_peak_bytes=float(cost.server_memory_bytes.max()),
        server_memory_bytes=float(cost.server_memory_bytes.sum()),
        cloud_memory_bytes=float(cost.server_memory_bytes[0]),
        devices_over_memory=int((cost.device_memory_bytes > devices.memory_bytes).sum()),
        servers_over_memory=int((cost.server_memory_bytes > servers.memory_bytes).sum()),
    )


def totals(rows: Sequence[RoundRow]) -> dict[str, float]:
    """Return the sums of a scenario's rounds; of memory, the largest."""
    added = (
        "delay_s",
        "waiting_s",
        "device_energy_j",
        "server_energy_j",
        "uplink_bytes",
        "downlink_bytes",
        "backhaul_bytes",
    )
    largest = (
        "device_peak_bytes",
        "server_peak_bytes",
        "devices_over_memory",
        "servers_over_memory",
    )
    return {
        "rounds": len(rows),
        **{name: sum(getattr(row, name) for row in rows) for name in added},
        **{name: max(getattr(row, name) for row in rows) for name in largest},
    }


def comparison_table(results: Results, refused: Mapping[str, str] | None = None) -> Table:
    """Return one row per scenario; all figures are modelled.

    Rows of scenarios in `refused` say why, by name.
    """
    rounds = " or ".join(str(n) for n in sorted({len(rows) for rows in results.values()})) or "no"
    table = Table(
        title=f"Modelled cost of {rounds} rounds: seconds in total, the rest per round",
        caption="* more than the machine has" if _crowded(results) else None,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("scenario", overflow="fold", min_width=20)
    for heading in (
        "total\ns",
        "round\ns",
        "device\nJ",
        "server\nJ",
        "up\nMB",
        "down\nMB",
        "device\nmem MB",
        "server\nmem MB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, rows in results.items():
        total = totals(rows)
        figures = (
            total["delay_s"],
            total["delay_s"] / len(rows),
            total["device_energy_j"] / len(rows),
            total["server_energy_j"] / len(rows),
            total["uplink_bytes"] / len(rows) / 1e6,
            total["downlink_bytes"] / len(rows) / 1e6,
        )
        peaks = (
            _short(total[f"{tier}_peak_bytes"] / 1e6) + "*" * bool(total[f"{tier}s_over_memory"])
            for tier in ("device", "server")
        )
        table.add_row(plain_text(name), *map(_short, figures), *peaks)
    for name, reason in (refused or {}).items():
        table.add_row(plain_text(f"{name}: refused, {' '.join(reason.split())}"), *["-"] * 8)
    return table


def _crowded(results: Results) -> bool:
    rows = (row for rows in results.values() for row in rows)
    return any(row.devices_over_memory or row.servers_over_memory for row in rows)


def _short(value: float) -> str:
    for unit, least, size in (("G", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e4, 1e3)):
        if value >= least:
            return f"{value / size:.4g}{unit}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def write_results(results: Results, folder: Path, refused: Mapping[str, str] | None = None) -> None:
    """Write ``plan.csv`` (a line per scenario and round), ``plan.json`` and ``plan.png``.

    Scenarios in `refused` are in ``plan.json`` alone, each with its reason under ``refused``.
    """
    lines = [{"scenario": name, **asdict(row)} for name, rows in results.items() for row in rows]
    with (folder / "plan.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    record: dict[str, Any] = {
        name: {"total": totals(rows), "rounds": [asdict(row) for row in rows]}
        for name, rows in results.items()
    } | {name: {"refused": reason} for name, reason in (refused or {}).items()}
    (folder / "plan.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _plot(results, folder / "plan.png")


def _plot(results: Results, path: Path) -> None:
    shown = list(results)[:MAX_BARS]
    sums = [totals(results[name]) for name in shown]
    panels: tuple[tuple[str, dict[str, list[float]]], ...] = (
        ("seconds per round", {"": [t["delay_s"] / t["rounds"] for t in sums]}),
        (
            "energy per round (J)",
            {
                "devices": [t["device_energy_j"] / t["rounds"] for t in sums],
                "servers": [t["server_energy_j"] / t["rounds"] for t in sums],
            },
        ),
        (
            "traffic per round (MB)",
            {
                "up": [t["uplink_bytes"] / t["rounds"] / 1e6 for t in sums],
                "down": [t["downlink_bytes"] / t["rounds"] / 1e6 for t in sums],
            },
        ),
    )
    tall = 1.2 + 0.2 * len(shown)
    with figure(path, width_in=PAGE_IN, height_in=tall, panels=(1, 3), sharey=True) as made:
        canvas, places = made
        for axes, (title, series) in zip(places, panels, strict=True):
            left = [0.0] * len(shown)
            for number, (label, values) in enumerate(series.items()):
                look = {"color": COLOURS[number], "hatch": HATCHES[number], "edgecolor": "white"}
                axes.barh(range(len(shown)), values, left=left, label=label or None, **look)
                left = [a + b for a, b in zip(left, values, strict=True)]
            axes.set_xlabel(title)
            axes.set_yticks(range(len(shown)), shown)
            axes.grid(visible=False, axis="y")
            legend(axes)
        places[-1].invert_yaxis()
        if len(shown) < len(results):
            canvas.suptitle(f"First {len(shown)} of {len(results)} scenarios")
