"""``fedsplit.run``, ``fedsplit.study`` and ``fedsplit.plan``: the commands, for Python."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console

from fedsplit.errors import FedsplitError
from fedsplit.report import make_console
from fedsplit.report.studies.frame import Study

from .config import load_config, require_plain
from .launch.engine import Engine
from .launch.run import train
from .overrides import quoted
from .plan import build_scenario
from .study import run_members
from .sweep import members

_WORD = re.compile(r"(?!(null|true|false)$)[A-Za-z_][\w.-]*")


def run(overrides: Sequence[str], settings: Mapping[str, Any], quiet: bool) -> Study:
    """Do what `fedsplit.run` says."""
    with Engine() as engine:
        folder, cause = train(_texts(overrides, settings), engine, _console(quiet))
    if cause is not None:
        raise FedsplitError(f"the run in {folder} failed: {cause}")
    return Study.open(folder)


def study(overrides: Sequence[str], settings: Mapping[str, Any], quiet: bool) -> Study:
    """Do what `fedsplit.study` says."""
    folder = run_members(members(_texts(overrides, settings), multirun=True), _console(quiet))[0]
    return Study.open(folder)


def plan(overrides: Sequence[str], settings: Mapping[str, Any]) -> pd.DataFrame:
    """Do what `fedsplit.plan` says."""
    rows = []
    for member in members(_texts(overrides, settings), multirun=True):
        config = load_config(member.overrides)
        require_plain(config)
        held = {"strategy": config.strategy.name, "seed": config.seed} | member.values()
        rows += [held | vars(row) for row in build_scenario(config).rows(config.rounds)]
    return pd.DataFrame(rows)


def _texts(overrides: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    return [*overrides, *(f"{key}={_written(value)}" for key, value in settings.items())]


def _written(value: Any) -> str:
    """Return a Python value in Hydra's notation; a list is what is swept over."""
    if isinstance(value, list | tuple | range):
        return ",".join(map(_written, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    # As one would type it: quotes would be another name of the same run.
    as_it_is = isinstance(value, int | float) or _WORD.fullmatch(value)
    return str(value) if as_it_is else quoted(str(value))


def _console(quiet: bool) -> Console:
    return Console(quiet=True) if quiet else make_console()
