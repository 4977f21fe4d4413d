"""A paper's study: what conf/study/PAPER.yaml says of it, and what its members cost."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig

from fedsplit.arrays import Array
from fedsplit.errors import require_choice
from fedsplit.flower import System
from fedsplit.mapping import from_mapping
from fedsplit.models import ModelSpec
from fedsplit.report.studies.charts import BAR, LINE, Chart
from fedsplit.report.studies.groups import GROUP

from ..config import load_config
from ..plan import Scenario, build_scenario
from ..sweep import MEMBER, named_members, read_study
from ..values import plain

Values = Mapping[str, Array]
"""Numbers by what has them: a member, or what a paper's module works out beside."""
EACH = "each"
"""Stands for all members that are swept over nothing, in their order."""
_WORDS = ("what", "claim", "paper_baseline", "strongest_baseline", "gain", "tuned", "better")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a paper beside ours: `ours` against `paper_baseline`, in `unit`.

    Numbers (`ours`, `against_strongest`, `ours_better`) are written ``A / B``: by how many percent
    A's `metric` differs from B's, in the mean where both are several; or ``A``, taken as it is. Of
    a list of them the largest counts. Words may hold settings (``{paper.cut}``) and what a paper's
    module works out. `claim` is "none" for a comparison that the paper does not make.
    `strongest_baseline` is the strongest that an honest referee would ask for. `tuned` says what
    was chosen with the claim in view, and by whom. The mean of `ours` counts as reproduced in
    `accepted`; None: the figure is for information. `better` names the options of fedsplit's own
    with which it is `ours_better`.
    """

    what: str
    claim: str = "none"
    paper_baseline: str
    metric: str = "delay_s"
    ours: str
    strongest_baseline: str = "the same"
    against_strongest: str | tuple[str, ...] | None = None
    gain: str
    tuned: str = "nothing"
    accepted: tuple[float, float] | None = None
    ours_better: str | None = None
    better: str = ""
    unit: str = "%"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure like the paper's: lines over what `x` names in `Case.x`, bars where that is names.

    A series is ``A``, or ``A / B`` in percent of B, of `metric` or of the one before it in a list.
    """

    x: str
    x_label: str = ""
    y_label: str
    metric: str = "delay_s"
    series: Mapping[str, str | tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class PaperStudy:
    """The file of a study: of `members`, and of small ones that are to be trained.

    `figures` and `plots` compare the members, `measured` the trained ones; `notes` must be known
    to read them.
    """

    overrides: tuple[str, ...]
    members: Mapping[str, tuple[str, ...]]
    figures: tuple[Figure, ...]
    plots: tuple[Plot, ...]
    notes: tuple[str, ...]
    train: Mapping[str, tuple[str, ...]]
    measured: tuple[Figure, ...] = ()


class Case:
    """A study with one seed: its `config`, and `values` by metric and member.

    `x` is what values are over where there are several, by member; `scenarios` what was costed;
    `words` what figures and notes may name: the settings, and what a paper's module works out.
    """

    def __init__(self, study: PaperStudy, overrides: Sequence[str]) -> None:
        common = [*study.overrides, *overrides]
        self.config = load_config(common)
        self.values: dict[str, dict[str, Array]] = defaultdict(dict)
        self.x: dict[str, list[Any]] = defaultdict(list)
        self.scenarios: dict[str, Scenario] = {}
        self.words: dict[str, object] = {str(name): held for name, held in self.config.items()}
        self._members = named_members(common, study.members) if study.members else []

    def add(self, metric: str, member: str, value: Array | Sequence[float] | float) -> None:
        """Add a value, or the mean of several, behind those that a member has."""
        held = self.values[metric]
        held[member] = np.append(held.get(member, ()), np.mean(value))

    def cost(
        self, on: Callable[[System], System] = lambda system: system
    ) -> dict[str, dict[str, Array]]:
        """Cost all members, in the mean over the rounds, each on the system that `on` returns."""
        for member in self._members:
            scenario = build_scenario(load_config(member.overrides))
            swept = member.values()
            name = str(swept.pop(MEMBER))
            system = on(scenario.system)
            if swept:  # what might be: a route takes a second to try, and nothing is trained
                system = replace(system, try_route=lambda route: None)
            self.scenarios[name] = scenario = replace(scenario, system=system)
            rounds = pd.DataFrame(scenario.rows(self.config.rounds))
            for held in (name,) if swept else (name, EACH):
                self.x[held].append(next(iter(swept.values()), name))
                for metric, values in rounds.items():
                    self.add(str(metric), held, values.to_list())
        return self.values

    def chart(self, plot: Plot) -> Chart:
        """Return what a plot shows."""
        x, y, rows = self.x[plot.x], plot.y_label, []
        for name, said in plot.series.items():
            metric, text = (plot.metric, said) if isinstance(said, str) else said
            ours, baseline = _parts(self.values[metric], text)
            shown = np.broadcast_to(ours if baseline is None else 100 * ours / baseline, len(x))
            for place, value in zip(x, shown.tolist(), strict=True):
                group = name if plot.x_label else f"{place} {name}".strip()
                rows.append({GROUP: group, plot.x_label: place, y: value})
        names = (plot.x_label, y) if plot.x_label else (y,)
        kind = LINE if plot.x_label else BAR
        return Chart(kind=kind, names=names, data=pd.DataFrame(rows), ci=False)


@dataclass(frozen=True, eq=False)
class Row:
    """A figure over seeds: its words, and its numbers, one of each seed."""

    words: Figure
    ours: Array
    against_strongest: Array
    ours_better: Array | None

    @classmethod
    def over(
        cls, figure: Figure, found: Sequence[Mapping[str, Values]], words: Mapping[str, object]
    ) -> "Row":
        """Return the row of a figure from the values of several seeds, with `words` in its own."""

        def numbers(text: str | Sequence[str]) -> Array:
            return np.array([number(values[figure.metric], text) for values in found])

        said = {name: getattr(figure, name).format_map(words) for name in _WORDS}
        return cls(
            replace(figure, **said),
            numbers(figure.ours),
            numbers(figure.against_strongest or figure.ours),
            numbers(figure.ours_better) if figure.ours_better else None,
        )

    @property
    def passed(self) -> bool | None:
        """Whether the mean over the seeds is within the accepted range; None if there is none."""
        accepted = self.words.accepted
        return None if accepted is None else accepted[0] <= float(self.ours.mean()) <= accepted[1]


@dataclass(frozen=True, eq=False)
class Findings:
    """What came out for a paper over all `seeds`; `case` is that of the first, for the plots."""

    paper: str
    study: PaperStudy
    case: Case
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    provenance: str


def read(paper: str) -> PaperStudy:
    """Return the study of a paper."""
    return from_mapping(PaperStudy, read_study(paper), f"study={paper}")


def extent(values: Array) -> tuple[float, float, float]:
    """Return mean, least and largest."""
    return float(values.mean()), float(values.min()), float(values.max())


def spread_text(*values: float) -> str:
    """Return mean, least and largest with one decimal, or as 1e-13 where that would be zero."""
    mean, low, high = (f"{one:.0e}" if 0 < abs(one) < 0.01 else f"{one:.1f}" for one in values)
    return mean if low == high else f"{mean} ({low} to {high})"


def model(config: DictConfig, name: str) -> ModelSpec:
    """Return one of the models that the settings of a paper name."""
    return from_mapping(ModelSpec, plain(config.paper.models[name]), f"paper.models.{name}")


def number(values: Values, text: str | Sequence[str]) -> float:
    """Return what a figure's ``A / B`` is, or the largest of several."""
    parts = (_parts(values, one) for one in ([text] if isinstance(text, str) else text))
    changes = (a if b is None else 100 * (a / b - 1) for a, b in parts)
    return max(float(np.mean(change)) for change in changes)


def _parts(values: Values, text: str) -> tuple[Array, Array | None]:
    ours, _, baseline = text.partition(" / ")
    for name in (ours, baseline or ours):
        require_choice("member", name, tuple(values))
    return values[ours], values[baseline] if baseline else None
