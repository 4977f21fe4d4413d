"""One HTML page about a run or a study that can be mailed: it asks for nothing on any network."""

import base64
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from fedsplit.errors import FedsplitError, SettingsError
from fedsplit.figures import COLOURS, HATCHES, figure, label, legend, scale
from fedsplit.plan import TIERS
from fedsplit.report.studies.charts import BAR, LINE, chart, write
from fedsplit.report.studies.frame import Study
from fedsplit.report.studies.groups import GROUP, grouped
from fedsplit.report.studies.protocols import Comparison, budget, target
from fedsplit.report.turns import read_turns

MAX_ROUTES, MAX_TURNS, MAX_SLOW, MAX_FAILURES = 6, 24, 12, 50
TRACE = "modelled_trace.json"
_SEGMENT = re.compile(r"(\w+)\[(\d+):(\d+)\]")
_QUALITY = ("eval_loss", "accuracy", "train_loss")
_SPENT = ("delay_s", "traffic_bytes", "energy_j")
_MEMORY = ("device_peak_bytes", "server_peak_bytes")
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto;
  padding: 1rem; max-width: 70rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: .2rem 0; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
p, ul { margin: .4rem 0; } .note { color: #555; font-size: .87rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; }
th, td { padding: .22rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal;
  min-width: 4.5rem; }
.wide + .wide { margin-top: .8rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
 .text { text-align: left; }
td.long { white-space: normal; min-width: 14rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1rem; } figure { margin: 0; } figure img { width: 100%; max-width: 34rem; height: auto; }
figure.page img { max-width: 100%; } figcaption { font-size: .87rem; color: #555; }
summary { cursor: pointer; } .bad { color: #a40000; }
@media print { details { display: none; } }
"""
# A browser that keeps to this asks for nothing, whatever a name in the page contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting that the runs were made with, and where its value comes from."""

    key: str
    value: str
    origin: str


def write_page(
    study: Study,
    path: Path,
    *,
    settings: Sequence[Setting] = (),
) -> None:
    """Write the page.

    Parameters
    ----------
    study : Study
        What it is about.
    path : Path
        The HTML file.
    settings : sequence of Setting
        What all runs were made with.

    Raises
    ------
    FedsplitError
        If no run of the study has come to a round.
    """
    if study.rounds.empty:
        raise FedsplitError(f"{study.folder}: no run has come to a round yet")
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        parts = [
            _heading(study),
            _section("Runs", _runs(study)),
            _section("Quality and cost", _curves(study, place)),
            _section("Who holds which blocks", _routes(study, place)),
            _section("Schemes compared", _protocols(study)),
            _section("Slowest turns", _slowest(study)),
            _section("Failures", _failures(study)),
            _section("Settings", _settings(settings)),
        ]
    title = escape(f"fedsplit: {study.folder.resolve().name}")
    head = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style></head><body>'
    )
    path.write_text("\n".join([head, *filter(None, parts), "</body></html>\n"]), encoding="utf-8")


def _heading(study: Study) -> str:
    done = sum(member.status == "done" for member in study.members)
    varied = [key for key in study.keys if study.rounds[key].nunique() > 1]
    swept = f", over {', '.join(varied)}" if varied else ""
    runs = f"{len(study.members)} runs" if len(study.members) > 1 else "one run"
    words = f"{runs}{swept}; {done} done, {len(study.members) - done} not."
    kinds = (
        "Losses, bytes sent and wall seconds are measured; delay, energy, traffic and memory are "
        "modelled, for the machines and the radio of the settings below."
    )
    return (
        f"<h1>{escape(study.folder.resolve().name)}</h1><p>{escape(words)}</p>"
        f'<p class="note">{kinds}</p>'
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _runs(study: Study) -> str:
    shown = [name for name in (*_QUALITY, *_SPENT, *_MEMORY, "wall_s") if name in study.metrics]
    last = study.rounds.groupby("run", sort=False)[["round", *shown]].last()
    rows: list[list[Any]] = []
    for member in study.members:
        there = member.name in last.index
        values = last.loc[member.name] if there else None
        figures = [None if values is None else values[name] / scale(name) for name in shown]
        rounds = None if values is None else int(values["round"])
        rows.append([member.name, member.status, rounds, *figures])
    return _table(["run", "status", "rounds", *map(label, shown)], rows)


def _curves(study: Study, place: Path) -> str:
    quality = next((name for name in _QUALITY if name in study.metrics), "")
    made: list[tuple[str, tuple[str, ...]]] = []
    for spent in _SPENT:
        if quality and spent in study.metrics:
            made.append((LINE, (spent, quality)))
    made += [(BAR, (name,)) for name in _MEMORY if name in study.metrics]
    figures = []
    for kind, names in made:
        with suppress(SettingsError):  # it never has both in one round
            drawn = chart(study, names, kind=kind, ci=True)
            stem = place / "_".join((kind, *names))
            words = " against ".join(label(name) for name in reversed(names))
            runs = int(drawn.data["runs"].max())
            caption = words if runs < 2 else f"{words}; 95 % intervals over {runs} seeds"
            figures.append(_image(write(drawn, stem, ["svg"], width_in=4.6)[0], caption))
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def _routes(study: Study, place: Path) -> str:
    named, _ = grouped(study)
    groups = named.drop_duplicates(GROUP).set_index("run")[GROUP].astype(str).to_dict()
    drawn: list[str] = []
    for member in (item for item in study.members if item.name in groups):
        turns = [turn for turn in read_turns(study.folder / member.folder) if turn.route]
        trained = [turn for turn in turns if turn.phase == "train"]
        if trained:
            last = trained[-1].round
            routes = {turn.device: turn.route for turn in trained if turn.round == last}
            path = draw_routes(routes, place / f"routes{len(drawn)}.svg")
            drawn.append(_image(path, f"{groups[member.name]}: routes of round {last}"))
    left = f'<p class="note">First {MAX_ROUTES} of {len(drawn)}.</p>'
    figures = f'<div class="figures">{"".join(drawn[:MAX_ROUTES])}</div>'
    return figures + left * (len(drawn) > MAX_ROUTES) if drawn else ""


def draw_routes(routes: Mapping[int, str], path: Path) -> Path:
    """Draw routes by device, as ``device[0:2] -> server[2:8]``: which blocks are on which tier."""
    shown = sorted(routes)[:MAX_TURNS]
    parts = {device: _SEGMENT.findall(routes[device]) for device in shown}
    used = {tier for segments in parts.values() for tier, _, _ in segments}
    tiers = [tier for tier in TIERS if tier in used]
    with figure(path, width_in=4.6, height_in=0.9 + 0.22 * len(shown)) as (_, axes):
        looks = {
            tier: {"color": COLOURS[n], "hatch": HATCHES[n], "edgecolor": "white"}
            for n, tier in enumerate(tiers)
        }
        for height, device in enumerate(shown):
            for tier, start, stop in parts[device]:
                axes.barh(height, int(stop) - int(start), left=int(start), **looks[tier])
        for tier, look in looks.items():
            axes.barh(0, 0, label=tier, **look)
        axes.set_yticks(range(len(shown)), [f"device {device}" for device in shown])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        left_out = f", first {len(shown)} of {len(routes)} devices" * (len(routes) > len(shown))
        axes.set(xlabel=f"blocks of the model{left_out}")
        legend(axes)
    return path


def _protocols(study: Study) -> str:
    if study.rounds["seed"].nunique() < 2:
        return ""
    quality = next((name for name in _QUALITY if name in study.metrics), "")
    found = []
    for protocol in (budget, target):
        with suppress(SettingsError):
            found.append(protocol(study, quality))
    several = [one for one in found if len(one.table) > 1]
    return "".join(_comparison(one) for one in several)


def _comparison(one: Comparison) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in one.notes)
    tables = "".join(
        _table([heading(name) for name in table], scaled(table).to_numpy().tolist())
        for table in (one.table, one.test)
    )
    return f'<h3>{escape(one.title)}</h3>{tables}<ul class="note">{notes}</ul>'


def scaled(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of findings in the units of `label`, to be read."""
    return table.assign(
        **{
            name: table[name] / scale(name.removesuffix(".half_width"))
            for name in table.select_dtypes("number")
        }
    )


def heading(name: str) -> str:
    """Return what stands over a column of findings."""
    if name.endswith(".half_width"):
        return "± half width"
    return label(name) if name != GROUP else "scheme"


def _slowest(study: Study) -> str:
    found: list[list[Any]] = []
    for member in study.members:
        trace = study.folder / member.folder / TRACE
        with suppress(OSError, ValueError, KeyError, TypeError):
            spans = turns_of(json.loads(trace.read_text(encoding="utf-8")))
            found += [[member.name, *span] for span in spans]
    found.sort(key=lambda row: -row[-1])
    head = ["run", "device", "branch", "turn", "begins (s)", "takes (s)"]
    about = '<p class="note">Of the last round of each run, on the modelled system.</p>'
    return about + _table(head, found[:MAX_SLOW]) if found else ""


def turns_of(trace: Mapping[str, Any]) -> list[list[Any]]:
    """Return each turn in a run's modelled trace: device, branch, turn, begin and duration (s)."""
    events = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    spans: dict[tuple[str, int, int], tuple[float, float]] = {}
    for event in events:
        who = names.get(event["pid"], "")
        if event["ph"] == "X" and who.startswith("device"):
            key = (who, event["args"]["branch"], event["args"]["turn"])
            begin, end = event["ts"], event["ts"] + event["dur"]
            low, high = spans.get(key, (begin, end))
            spans[key] = min(low, begin), max(high, end)
    return [[*key, low / 1e6, (high - low) / 1e6] for key, (low, high) in spans.items()]


def _failures(study: Study) -> str:
    rows = [
        [member.name, record.round, failure.who, failure.phase, failure.reason]
        for member in study.members
        for record in study.records(member)
        for failure in record.failures
    ]
    rows += [
        [member.name, None, "the run", member.status, member.reason]
        for member in study.members
        if member.reason is not None
    ]
    if not rows:
        return "<p>None: no device was lost, and no run failed.</p>"
    left = (
        f'<p class="note">First {MAX_FAILURES} of {len(rows)}.</p>'
        if len(rows) > MAX_FAILURES
        else ""
    )
    return left + _table(["run", "round", "who", "phase", "why"], rows[:MAX_FAILURES])


def _settings(settings: Sequence[Setting]) -> str:
    changed = [item for item in settings if item.origin != "default"]
    rest = [item for item in settings if item.origin == "default"]

    def table(items: Iterable[Setting]) -> str:
        rows = [[item.key, item.value, item.origin] for item in items]
        return _table(["setting", "value", "from"], rows)

    if not settings:
        return ""
    return (
        table(changed) if changed else "<p>All as they are by default.</p>"
    ) + f"<details><summary>{len(rest)} as they are by default</summary>{table(rest)}</details>"


def _image(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    words = escape(caption)
    source = f"data:image/svg+xml;base64,{data}"
    return f'<figure><img alt="{words}" src="{source}"><figcaption>{words}</figcaption></figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    texts = [any(isinstance(row[n], str) for row in rows) for n in range(len(head))]
    begin = "".join(
        f"<th{' class=text' * text}>{escape(name)}</th>"
        for name, text in zip(head, texts, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    table = f"<table><thead><tr>{begin}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _cell(value: Any) -> str:
    if isinstance(value, str):
        kind = "text long" if len(value) > 40 else "text"
        return f'<td class="{kind}">{escape(value)}</td>'
    if value is None or value != value:
        return "<td>–</td>"
    return f"<td>{value:.4g}</td>" if isinstance(value, float) else f"<td>{value}</td>"
