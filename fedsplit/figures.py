"""The look of every figure: sizes for print, readable in grey and by the colour-blind, units."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN_IN, PAGE_IN = 3.5, 7.16
"""Widths of a column and of a page of the IEEE's, in inches."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, for all kinds of colour vision, but for the yellow: too light on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo")
MEGABYTE = 1e6
SEQUENTIAL = "cividis"
"""Colour map of a quantity: the same order in grey and to the colour-blind."""

_LOOK: Any = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,  # text that stays text, as publishers ask
    "svg.hashsalt": "fedsplit",
}
# The same data make the same file, whenever it is drawn.
_UNDATED = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_NAMES: Mapping[str, tuple[str, str]] = {
    "delay_s": ("modelled time", "s"),
    "waiting_s": ("modelled time in queues", "s"),
    "wall_s": ("measured time", "s"),
    "energy_j": ("modelled energy", "J"),
    "device_energy_j": ("modelled energy of devices", "J"),
    "server_energy_j": ("modelled energy of servers", "J"),
    "uplink_bytes": ("modelled uplink", "MB"),
    "downlink_bytes": ("modelled downlink", "MB"),
    "backhaul_bytes": ("modelled backhaul", "MB"),
    "traffic_bytes": ("modelled traffic", "MB"),
    "device_peak_bytes": ("modelled device memory", "MB"),
    "server_peak_bytes": ("modelled server memory", "MB"),
    "bytes_up.device": ("sent by devices", "MB"),
    "bytes_down.device": ("received by devices", "MB"),
    "bytes_up.edge": ("sent by edges", "MB"),
    "bytes_down.edge": ("received by edges", "MB"),
    "train_loss": ("training loss", "nats per target"),
    "eval_loss": ("evaluation loss", "nats per target"),
    "perplexity": ("perplexity", ""),
    "accuracy": ("accuracy", ""),
    "round": ("round", ""),
    "gain_db": ("path gain", "dB"),
    "examples": ("training examples", ""),
    "samples": ("training samples", ""),
}
_ENDINGS = {"_s": "s", "_j": "J", "_hz": "Hz", "_dbm": "dBm", "_m": "m", "_bytes": "MB"}


def named(metric: str) -> tuple[str, str]:
    """Return a metric or setting in words, and its unit; none of a plain number."""
    if metric in _NAMES:
        return _NAMES[metric]
    ending = next((end for end in _ENDINGS if metric.endswith(end)), "")
    words = metric.removesuffix(ending).replace("_", " ").replace(".", " ")
    return words, _ENDINGS.get(ending, "")


def label(metric: str, about: str = "") -> str:
    """Return a metric or setting in words and what is to be said about it, with its unit."""
    words, unit = named(metric)
    return f"{words}{about} ({unit})" if unit else f"{words}{about}"


def scale(metric: str) -> float:
    """Return by what values of a metric are divided for the unit of its label."""
    return MEGABYTE if named(metric)[1] == "MB" else 1.0


def quantity(metric: str, value: float) -> str:
    """Return a metric and a value of it as text with its unit."""
    words, unit = named(metric)
    return f"{words} {value / scale(metric):.4g} {unit}".strip()


def styles(count: int) -> list[dict[str, Any]]:
    """Return colour, marker and dashes of `count` lines; any two differ in more than colour."""
    together = zip(cycle(COLOURS), cycle(MARKERS), cycle(DASHES), strict=False)
    return [
        {"color": colour, "marker": marker, "linestyle": dashes}
        for colour, marker, dashes in islice(together, count)
    ]


@contextmanager
def figure(
    path: str | Path | Sequence[Path],
    *,
    width_in: float = COLUMN_IN,
    height_in: float = 2.4,
    panels: tuple[int, int] = (1, 1),
    **sharing: Any,
) -> "Iterator[tuple[Figure, Any]]":
    """Make a figure and its axes, to be filled in the block and then written to `path`.

    Parameters
    ----------
    path : path or sequence of Path
        Where to; the suffix is the format (``.png``, ``.pdf``, ``.svg``).
    width_in, height_in : float
        Size in print.
    panels : pair of int
        Rows and columns of axes; with more than one, an array of them is given.
    **sharing
        Of `matplotlib.figure.Figure.subplots`.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Made

    # A figure of its own, without pyplot: no display is needed and nothing is shared.
    with rc_context(_LOOK):
        made = Made(figsize=(width_in, height_in), layout="constrained")
        FigureCanvasAgg(made)
        yield made, made.subplots(*panels, **sharing)
        for file in [Path(path)] if isinstance(path, str | Path) else path:
            made.savefig(file, dpi=300, metadata=_UNDATED.get(file.suffix))


def legend(axes: "Axes", columns: int = 4) -> None:
    """Name what is drawn, above the axes, where it hides nothing."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            names,
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=min(len(handles), columns),
            columnspacing=1.0,
            handlelength=2.4,
            borderaxespad=0.2,
        )
