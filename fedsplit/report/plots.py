"""The loss curve of a run."""

from collections.abc import Sequence
from pathlib import Path

from fedsplit.figures import figure, legend, styles
from fedsplit.report.records import RoundRecord

_WORDS = {"train_loss": "training", "eval_loss": "evaluation"}


def plot_loss(records: Sequence[RoundRecord], path: Path) -> None:
    """Draw training and evaluation loss over rounds to a PNG at `path`."""
    from matplotlib.ticker import MaxNLocator

    with figure(path) as (_, axes):
        for name, style in zip(_WORDS, styles(2), strict=True):
            points = [
                (record.round, loss)
                for record in records
                if (loss := getattr(record, name)) is not None
            ]
            if points:
                every = max(1, len(points) // 10)
                across, up = zip(*points, strict=True)
                axes.plot(across, up, label=_WORDS[name], markevery=every, **style)
        axes.set(xlabel="round", ylabel="loss (nats per target)")
        legend(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
