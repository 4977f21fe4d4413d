"""Figures and tables of a study, and the data behind each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from fedsplit.errors import SettingsError, require, require_choice
from fedsplit.figures import (
    COLOURS,
    COLUMN_IN,
    HATCHES,
    SEQUENTIAL,
    figure,
    label,
    legend,
    scale,
    styles,
)
from fedsplit.report.studies.frame import COSTS, Study
from fedsplit.report.studies.groups import GROUP, finals, grouped, is_better_high
from fedsplit.report.studies.statistics import half_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE, CDF, BAR, HEAT, PARETO, TABLE = KINDS = "line", "cdf", "bar", "heat", "pareto", "table"
MAP = "map"
"""Of the plane; made of a run's configuration, see `apps.worlds`."""
FORMATS = ("pdf", "svg", "png")
_MOST_CELLS, _MOST_TICKS = 12, 16
"""Numbers are written in a heat map, or on a map, of so many columns at most; so many ticks."""
_COUNTS = {LINE: 2, CDF: 1, BAR: 1, HEAT: 3, PARETO: 2}
_NEEDS = {
    LINE: "two metrics: X, such as delay_s or round, and Y",
    CDF: "one metric",
    BAR: "one metric",
    HEAT: "two keys and a metric",
    PARETO: "two metrics: X and Y",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Chart:
    """What a figure or table shows.

    Parameters
    ----------
    kind : str
        One of `KINDS`, or `MAP`.
    names : tuple of str
        Metrics and, of a heat map, keys, in the order that they were named.
    data : DataFrame
        The numbers that are drawn, in SI units.
    ci : bool
        Whether 95 % confidence intervals over seeds are drawn.
    """

    kind: str
    names: tuple[str, ...]
    data: pd.DataFrame
    ci: bool


def chart(
    study: Study,
    names: Sequence[str],
    *,
    kind: str = LINE,
    by: Sequence[str] = (),
    where: Sequence[str] = (),
    ci: bool = False,
) -> Chart:
    """Return what a figure of `study` shows.

    Parameters
    ----------
    study : Study
        The runs.
    names : sequence of str
        Of ``line`` and ``pareto``: metrics X and Y. Of ``cdf`` and ``bar``: a metric. Of ``heat``:
        two keys and a metric. Of ``table``: metrics.
    kind : str
        ``line``: Y over X, round by round, mean over seeds. ``cdf``: share of rounds with at most
        so much; of a device's metric, share of devices. ``bar``, ``table``: at the end of runs.
        ``heat``: the same over two keys. ``pareto``: X and Y at the end, and the groups that no
        other beats in both.
    by, where : sequence of str
        As of `grouped`.
    ci : bool
        Whether to draw 95 % confidence intervals over seeds.

    Raises
    ------
    SettingsError
        If a metric or key is unknown, or their number does not fit the kind.
    """
    require_choice("--kind", kind, KINDS)
    count = _COUNTS.get(kind, len(names))
    require(len(names) == count > 0, "METRIC", " ".join(names), _NEEDS.get(kind, "metrics"))
    if kind == HEAT:
        keys = [study.key(name) for name in names[:2]]
        if len(set(keys)) < 2:
            raise SettingsError("METRIC", " ".join(names), _NEEDS[HEAT])
        metric = study.metric(names[2])
        data = _at_the_end(study, [metric], keys, where)
        return Chart(kind=kind, names=(*keys, metric), data=data, ci=ci)
    if kind == CDF:
        return Chart(kind=kind, names=tuple(names), data=_shares(study, names[0], by, where), ci=ci)
    metrics = [study.metric(name) for name in names]
    make = _lines if kind == LINE else _at_the_end
    return Chart(kind=kind, names=tuple(metrics), data=make(study, metrics, by, where), ci=ci)


def _lines(
    study: Study, metrics: Sequence[str], by: Sequence[str], where: Sequence[str]
) -> pd.DataFrame:
    rounds, keys = grouped(study, by, where)
    x, y = metrics
    known = rounds.dropna(subset=[x, y])
    rows = [
        {
            **dict(zip((GROUP, *keys), held[:-1], strict=True)),
            "round": held[-1],
            "runs": len(part),
            x: part[x].mean(),
            y: part[y].mean(),
            f"{y}.half_width": half_width(part[y]),
        }
        for held, part in known.groupby([GROUP, *keys, "round"], dropna=False, observed=True)
    ]
    require(len(rows) > 0, "METRIC", y, "a metric that has a value where X has one")
    return pd.DataFrame(rows)


def _at_the_end(
    study: Study, metrics: Sequence[str], by: Sequence[str], where: Sequence[str]
) -> pd.DataFrame:
    rounds, keys = grouped(study, by, where)
    last = finals(rounds, metrics, keys)
    rows = []
    for held, part in last.groupby([GROUP, *keys], dropna=False, observed=True):
        row: dict[str, Any] = dict(zip((GROUP, *keys), held, strict=True)) | {"runs": len(part)}
        for metric in metrics:
            row |= {metric: part[metric].mean(), f"{metric}.half_width": half_width(part[metric])}
        rows.append(row)
    return pd.DataFrame(rows)


def _shares(study: Study, metric: str, by: Sequence[str], where: Sequence[str]) -> pd.DataFrame:
    named, _ = grouped(study, by, where)
    frame = study.frame[study.frame["metric"] == metric]
    if frame.empty:
        known = ", ".join(sorted(study.frame["metric"].unique()))
        raise SettingsError("metric", metric, f"one of {known}")
    groups = named.drop_duplicates("run").set_index("run")[GROUP]
    frame = frame[frame["run"].isin(groups.index)]
    parts = []
    for group, part in frame.groupby(frame["run"].map(groups), observed=True):
        values = np.sort(part["value"].dropna().to_numpy())
        share = np.arange(1, len(values) + 1) / len(values)
        parts.append(pd.DataFrame({GROUP: group, metric: values, "share": share}))
    return pd.concat(parts, ignore_index=True)


def front(data: pd.DataFrame, x: str, y: str) -> list[bool]:
    """Return which rows no other row beats: as good in both and better in one."""
    signs = [-1.0 if is_better_high(name) else 1.0 for name in (x, y)]
    points = data[[x, y]].to_numpy() * signs
    return [
        not any(np.all(other <= point) and np.any(other < point) for other in points)
        for point in points
    ]


def write(
    made: Chart, stem: Path, formats: Sequence[str] = FORMATS, width_in: float = COLUMN_IN
) -> tuple[Path, ...]:
    """Write a figure in each of `formats`, or a LaTeX table, and the data beside; return the paths.

    Raises
    ------
    FedsplitError
        If a format is unknown.
    """
    for name in formats:
        require_choice("--format", name, FORMATS)
    stem.parent.mkdir(parents=True, exist_ok=True)
    data = stem.with_name(f"{stem.name}.csv")
    made.data.to_csv(data, index=False)
    if made.kind == TABLE:
        text = stem.with_name(f"{stem.name}.tex")
        text.write_text(latex(made), encoding="utf-8")
        return text, data
    files = [stem.with_name(f"{stem.name}.{name}") for name in formats]
    height_in = 2.2 + 0.14 * -(-made.data.get(GROUP, pd.Series()).nunique() // 4)
    with figure(files, width_in=width_in, height_in=height_in) as (canvas, axes):
        _DRAWN[made.kind](made, axes)
        if made.kind in (HEAT, MAP):
            shaded = axes.images[0] if made.kind == HEAT else axes.collections[0]
            canvas.colorbar(shaded, ax=axes, label=label(made.names[2]))
    return (*files, data)


def latex(made: Chart) -> str:
    """Return a LaTeX table (booktabs) of means over seeds and half their 95 % intervals."""
    shown = pd.DataFrame({"": made.data[GROUP]})
    for name in made.names:
        values, half = made.data[name] / scale(name), made.data[f"{name}.half_width"] / scale(name)
        shown[label(name)] = [
            f"{value:.4g}" if np.isnan(width) else f"{value:.4g} ± {width:.2g}"
            for value, width in zip(values, half, strict=True)
        ]
    text: str = shown.to_latex(index=False, escape=True, column_format="l" + "r" * len(made.names))
    return text.replace("±", r"$\pm$")


def _draw_lines(made: Chart, axes: "Axes") -> None:
    x, y = made.names
    groups = list(made.data.groupby(GROUP, sort=False))
    for (name, part), style in zip(groups, styles(len(groups)), strict=True):
        across, up = part[x] / scale(x), part[y] / scale(y)
        every = max(1, len(part) // 8)
        axes.plot(across, up, label=str(name), markevery=every, **style)
        if made.ci:
            half = part[f"{y}.half_width"] / scale(y)
            axes.fill_between(across, up - half, up + half, color=style["color"], alpha=0.18, lw=0)
    axes.set(xlabel=label(x), ylabel=label(y))
    legend(axes)


def _draw_shares(made: Chart, axes: "Axes") -> None:
    (x,) = made.names
    groups = list(made.data.groupby(GROUP, sort=False))
    for (name, part), style in zip(groups, styles(len(groups)), strict=True):
        values = part[x] / scale(x)
        every = max(1, len(part) // 6)
        axes.step(
            [values.iloc[0], *values],
            [0.0, *part["share"]],
            where="post",
            label=str(name),
            markevery=every,
            **style,
        )
    about = " of a round" if x in COSTS else ""
    axes.set(xlabel=label(x, about), ylabel="share at most so much", ylim=(0, 1.02))
    legend(axes)


def _draw_bars(made: Chart, axes: "Axes") -> None:
    (y,) = made.names
    values = made.data[y] / scale(y)
    for place, (value, style) in enumerate(zip(values, styles(len(values)), strict=True)):
        hatch = HATCHES[place % len(HATCHES)]
        axes.bar(place, value, color=style["color"], hatch=hatch, edgecolor="white", width=0.7)
    if made.ci:
        half = made.data[f"{y}.half_width"] / scale(y)
        axes.errorbar(range(len(values)), values, half, fmt="none", ecolor="black", capsize=2, lw=1)
    groups = made.data[GROUP].astype(str).tolist()
    every = -(-len(groups) // _MOST_TICKS)
    turn: dict[str, Any] = {"rotation": 25, "ha": "right"} if len(values) > 4 else {}
    axes.set_xticks(range(0, len(values), every), groups[::every], **turn)
    axes.grid(visible=False, axis="x")
    axes.set(ylabel=label(y))


def _draw_heat(made: Chart, axes: "Axes") -> None:
    x, y, z = made.names
    table = made.data.pivot(index=y, columns=x, values=z) / scale(z)
    image = axes.imshow(table.to_numpy(), cmap=SEQUENTIAL, aspect="auto", origin="lower")
    middle = float(np.nanmean(image.get_clim()))
    shown = table.to_numpy() if table.shape[1] <= _MOST_CELLS else np.empty((0, 0))
    for (row, column), value in np.ndenumerate(shown):
        colour = "black" if value > middle else "white"
        axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=7)
    every = -(-table.shape[1] // _MOST_TICKS)
    axes.set_xticks(range(table.shape[1])[::every], [f"{held}" for held in table.columns[::every]])
    axes.set_yticks(range(table.shape[0]), [f"{held}" for held in table.index])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=label(x.rpartition(".")[2]), ylabel=label(y.rpartition(".")[2]))


def _draw_pareto(made: Chart, axes: "Axes") -> None:
    x, y = made.names
    across, up = made.data[x] / scale(x), made.data[y] / scale(y)
    best = made.data[front(made.data, x, y)].sort_values(x)
    axes.plot(best[x] / scale(x), best[y] / scale(y), color="0.6", lw=1, zorder=1)
    for place, style in enumerate(styles(len(made.data))):
        half = {}
        if made.ci:
            half = {
                "xerr": made.data[f"{x}.half_width"].iloc[place] / scale(x),
                "yerr": made.data[f"{y}.half_width"].iloc[place] / scale(y),
            }
        style |= {"linestyle": "none", "markersize": 5}
        name = made.data[GROUP].iloc[place]
        axes.errorbar(
            across.iloc[place],
            up.iloc[place],
            label=name,
            capsize=2,
            elinewidth=0.8,
            **half,
            **style,
        )
    axes.set(xlabel=label(x), ylabel=label(y))
    legend(axes)


def _draw_map(made: Chart, axes: "Axes") -> None:
    x, y, z = made.names
    stations = made.data[made.data["node"] == "station"].set_index("index")
    devices = made.data[made.data["node"] == "device"]
    home = stations.loc[devices["station"]]
    # First, as it is what the colour bar tells.
    axes.scatter(
        devices[x], devices[y], c=devices[z], cmap=SEQUENTIAL, s=22, zorder=2, label="device"
    )
    axes.plot([devices[x], home[x]], [devices[y], home[y]], color="0.8", lw=0.6, zorder=1)
    style: dict[str, Any] = {"marker": "^", "linestyle": "none", "markersize": 6}
    axes.plot(stations[x], stations[y], color=COLOURS[1], label="station", **style)
    if len(devices) <= _MOST_CELLS:
        for row in devices.itertuples():
            place = getattr(row, x), getattr(row, y)
            axes.annotate(str(row.index), place, (3, 3), textcoords="offset points", fontsize=7)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xlabel=label(x), ylabel=label(y))
    legend(axes)


_DRAWN = {
    LINE: _draw_lines,
    CDF: _draw_shares,
    BAR: _draw_bars,
    HEAT: _draw_heat,
    PARETO: _draw_pareto,
    MAP: _draw_map,
}
