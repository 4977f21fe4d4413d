"""Adapters that are kept beside the last: every so many rounds, and the best one's."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.models import SplitModel
from fedsplit.report import RoundRecord
from fedsplit.report.best import best_round
from fedsplit.report.export import save_trained

from .outputs import KeepSettings

KEPT = "kept"


class Keeper:
    """Keeps what was trained in a round under ``kept``, as a folder that other programs load.

    The best one's folder names its round. The one before goes only when the new one's round has
    its checkpoint: so a run that is killed in between finds the best of the rounds that it has.

    Parameters
    ----------
    folder : Path
        The run's output.
    settings : KeepSettings
        What is kept.
    by : str
        What the best round is judged by.
    model : SplitModel
        The whole model.
    initial : mapping of str to Tensor
        The adapters that the run began with.
    """

    def __init__(
        self,
        folder: Path,
        settings: KeepSettings,
        by: str,
        model: SplitModel,
        initial: Mapping[str, Tensor],
    ) -> None:
        self._folder = folder / KEPT
        self._settings = settings
        self._by = by
        self._model = model
        self._initial = initial

    def keep(self, records: Sequence[RoundRecord], adapters: Mapping[str, Tensor]) -> None:
        """Keep the adapters of the last round, if they are due."""
        number, every = records[-1].round, self._settings.every
        if every is not None and number % every == 0:
            self._write(f"round_{number}", adapters)
        if self._settings.best and best_round(records, self._by) == number:
            self._write(f"best_{number}", adapters)

    def clear(self, records: Sequence[RoundRecord]) -> None:
        """Take away what is the best no more, or is of a round that a resumed run has yet to do."""
        if not self._settings.best:
            return
        best = best_round(records, self._by)
        for place in self._folder.glob("best_*"):
            if place.name != f"best_{best}":
                shutil.rmtree(place, ignore_errors=True)

    def _write(self, name: str, adapters: Mapping[str, Tensor]) -> None:
        target, fresh = self._folder / name, self._folder / f".{name}.new"
        shutil.rmtree(fresh, ignore_errors=True)
        save_trained(fresh, adapters, self._model, self._initial)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)


def kept_folder(folder: Path, which: str) -> Path:
    """Return the folder of what was kept of a run: "best", or the number of a round.

    Raises
    ------
    FedsplitError
        If it was not kept; names what was.
    """
    there = sorted(path.name for path in (folder / KEPT).glob("[!.]*"))
    wanted = "best_" if which == "best" else f"round_{which}"
    for name in there:
        if name == wanted or (which == "best" and name.startswith(wanted)):
            return folder / KEPT / name
    known = ", ".join(name.partition("_")[2] for name in there if name.startswith("round_"))
    best = "best, " if any(name.startswith("best_") for name in there) else ""
    allowed = f"last, {best}{known}".rstrip(", ")
    raise FedsplitError(f"--round={which!r}: must be one of {allowed}")
