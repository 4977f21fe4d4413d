"""``fedsplit report``: a page about a run or a study, or what a protocol finds in it."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedsplit.errors import SettingsError, require_choice
from fedsplit.report import plain_text
from fedsplit.report.studies.frame import Study
from fedsplit.report.studies.page import Setting, heading, scaled, write_page
from fedsplit.report.studies.protocols import (
    BUDGET,
    PROTOCOLS,
    TARGET,
    Comparison,
    budget,
    robustness,
    target,
)

from .config import load_config
from .values import plain

PAGE = "report.html"
_DEFAULT, _CHANGED = "default", "changed"


def report_page(folder: Path, output: Path | None, console: Console) -> int:
    """Write the page about the run or study in `folder`; return the exit code.

    Raises
    ------
    FedsplitError
        If it holds neither.
    """
    study = Study.open(folder)
    path = output or folder / PAGE
    write_page(study, path, settings=_settings(study))
    console.print(plain_text(path), highlight=False, soft_wrap=True)
    return 0


def report_protocol(
    folder: Path,
    protocol: str,
    console: Console,
    *,
    metric: str = "eval_loss",
    within: Mapping[str, float] | None = None,
    reach: float | None = None,
    by: Sequence[str] = (),
    where: Sequence[str] = (),
) -> int:
    """Print what a protocol finds in the study in `folder`, and write it there as CSV.

    Raises
    ------
    FedsplitError
        If the protocol or a name is unknown, or the study does not have what it takes.
    """
    require_choice("--report", protocol, PROTOCOLS)
    study = Study.open(folder)
    if protocol == BUDGET:
        found = budget(study, metric, within, by, where)
    elif protocol == TARGET:
        found = target(study, metric, reach, by=by, where=where)
    else:
        found = robustness(study, metric, within, by or ("strategy",), where)
    place = folder / "reports"
    place.mkdir(exist_ok=True)
    found.table.to_csv(place / f"{protocol}.csv", index=False)
    found.test.to_csv(place / f"{protocol}_test.csv", index=False)
    _print(found, console)
    written = f"{place / protocol}.csv, {place / protocol}_test.csv"
    console.print(plain_text(written), highlight=False, soft_wrap=True)
    return 0


def _print(found: Comparison, console: Console) -> None:
    for title, frame in ((found.title, found.table), ("Pairs", found.test)):
        table = Table(
            title=plain_text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False
        )
        shown = scaled(frame)
        for name in shown:
            words = heading(name)
            numeric = shown[name].dtype.kind in "if"
            table.add_column(words, justify="right" if numeric else "left", overflow="fold")
        for row in shown.itertuples(index=False):
            table.add_row(*(plain_text(_figure(value)) for value in row))
        if len(shown):
            console.print(table)
    for note in found.notes:
        console.print(f"- {plain_text(note)}", highlight=False)


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings(study: Study) -> list[Setting]:
    """Return the settings that all runs share, and where each comes from."""
    configs = [_leaves(study.config(member)) for member in study.members if study.records(member)]
    if not configs:
        return []
    default = _leaves(plain(load_config([])))
    paper = configs[0].pop("paper.provenance", None)
    shared = {
        key: value
        for key, value in configs[0].items()
        if key not in ("output", "resume") and all(config.get(key) == value for config in configs)
    }
    settings = [
        Setting(
            key=key,
            value=str(value),
            origin=_DEFAULT if default.get(key, ...) == value else _CHANGED,
        )
        for key, value in shared.items()
    ]
    if paper is not None:
        settings.insert(0, Setting(key="paper.provenance", value=str(paper), origin="paper"))
    return settings


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def limits(texts: Sequence[str]) -> dict[str, float]:
    """Return METRIC=VALUE as limits.

    Raises
    ------
    SettingsError
        If one is not written so.
    """
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        number = None
        with suppress(ValueError):
            number = float(value)
        if number is None or not number >= 0:
            raise SettingsError("--within", text, "written METRIC=VALUE, as in delay_s=60")
        found[name] = number
    return found
