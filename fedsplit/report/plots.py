"""The loss curve of a run."""

from collections.abc import Sequence
from pathlib import Path

from fedsplit.report.records import RoundRecord


def plot_loss(records: Sequence[RoundRecord], path: Path) -> None:
    """Draw training and evaluation loss over rounds to a PNG at `path`."""
    # A figure of its own, without pyplot: no display is needed and nothing is shared.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="round", ylabel="loss per target (nats)")
    for label, marker, points in (
        ("training", ".", [(r.round, r.train_loss) for r in records if r.train_loss is not None]),
        ("evaluation", "o", [(r.round, r.eval_loss) for r in records if r.eval_loss is not None]),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=label)
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=150)
