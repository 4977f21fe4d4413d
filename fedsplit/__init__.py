"""Split federated fine-tuning of large models over wireless networks, on top of Flower.

In Python as on the command line::

    import fedsplit

    study = fedsplit.study("strategy=sft,splitfed", "seed=0,1,2", rounds=3, output="outputs/mine")
    study.rounds.groupby("strategy")["eval_loss"].min()
    fedsplit.plan("strategy=card", "channel.bandwidth_hz=5e6,20e6")
"""

from __future__ import annotations

import sys
from pathlib import Path

TYPE_CHECKING = False  # `typing` is not imported: a user's module of that name is not ours
if TYPE_CHECKING:
    from typing import Any

    import pandas as pd

    from fedsplit.report.studies.frame import Study

# Installed, the schemes and the command line are packages in this one, so that nobody's own
# `apps` or `strategies` are taken for them; in a checkout their folders lie beside it.
_here = Path(__file__).resolve().parent
if not (_here / "apps").is_dir():
    __path__.append(str(_here.parent))


def run(*overrides: str, quiet: bool = False, **settings: Any) -> Study:
    """Run a job, as ``fedsplit run`` does.

    Parameters
    ----------
    *overrides : str
        As behind ``fedsplit run``: ``"strategy=sft"``, ``"train.optimizer.lr=1e-3"``.
    quiet : bool
        Whether to print nothing.
    **settings
        Settings whose name has no dot, as values: ``rounds=3``, ``output="outputs/mine"``.

    Returns
    -------
    Study
        Of one run: `rounds` has a row per round, `frame` all that is known.

    Raises
    ------
    FedsplitError
        If a setting is wrong, or the run failed.
    """
    return _python().run(overrides, settings, quiet)  # type: ignore[no-any-return]


def study(*overrides: str, quiet: bool = False, **settings: Any) -> Study:
    """Run a job for every combination of what is swept over, as ``fedsplit run -m`` does.

    Parameters as of `run`; a list sweeps, as in ``seed=[0, 1, 2]``. Runs that are complete in the
    folder ``output`` are not run again.

    Returns
    -------
    Study
        Every run. Those that were refused or failed say so in ``members``.

    Raises
    ------
    FedsplitError
        If the overrides are wrong, or all runs were refused.
    """
    return _python().study(overrides, settings, quiet)  # type: ignore[no-any-return]


def plan(*overrides: str, **settings: Any) -> pd.DataFrame:
    """Say what schemes would cost, without training, as ``fedsplit plan -m`` does.

    Parameters as of `study`.

    Returns
    -------
    DataFrame
        A row per scenario and round: what is swept over, and the costs.

    Raises
    ------
    FedsplitError
        If a scenario is refused.
    """
    return _python().plan(overrides, settings)


def _python() -> Any:
    # Only now: `import fedsplit` alone brings neither torch nor Hydra.
    from importlib import import_module

    return import_module("fedsplit.apps.python")


class _Package(type(sys)):  # type: ignore[misc]
    """This package, where `plan` stays the function; importing ``fedsplit.plan`` would bind it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "plan" and isinstance(value, type(sys))):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
