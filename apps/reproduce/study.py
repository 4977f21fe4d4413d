"""A paper's study: what conf/study/PAPER.yaml says of it, and what its members cost."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedsplit.arrays import Array
from fedsplit.errors import require_choice
from fedsplit.figures import scale
from fedsplit.flower import System
from fedsplit.mapping import from_mapping

from ..config import load_config
from ..plan import Scenario, build_scenario
from ..sweep import MEMBER, named_members, read_study

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
class Chart:
    """A plot over what `x` names in `Case.x`: bars where these are names, else lines.

    A series is ``A``, or ``A / B`` in percent of B, of `delay_s` or of the metric before it.
    """

    title: str
    x: str
    x_label: str = ""
    y_label: str
    stacked: bool = False
    series: Mapping[str, str | tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class PaperStudy:
    """The file of a study: of `members`, and of small ones that are to be trained.

    `figures` and `charts` compare the members, `measured` the trained ones; `notes` must be known
    to read them.
    """

    overrides: tuple[str, ...]
    members: Mapping[str, tuple[str, ...]]
    figures: tuple[Figure, ...]
    charts: tuple[Chart, ...]
    notes: tuple[str, ...]
    train: Mapping[str, tuple[str, ...]]
    measured: tuple[Figure, ...] = field(default=())


class Case:
    """A study with one seed: its `config`, and `values` by metric and member.

    `x` is what values are over where there are several, by member; `scenarios` what was costed.
    """

    def __init__(self, study: PaperStudy, overrides: Sequence[str]) -> None:
        common = [*study.overrides, *overrides]
        self.config = load_config(common)
        self.values: dict[str, dict[str, Array]] = defaultdict(dict)
        self.x: dict[str, list[Any]] = defaultdict(list)
        self.scenarios: dict[str, Scenario] = {}
        self._members = named_members(common, study.members) if study.members else []

    def cost(self, on: Callable[[System], System] = lambda system: system) -> None:
        """Cost all members, in the mean over the rounds, each on the system that `on` returns."""
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for member in self._members:
            scenario = build_scenario(load_config(member.overrides))
            scenario = replace(scenario, system=on(scenario.system))
            values = member.values()
            name = str(values.pop(MEMBER))
            self.scenarios[name] = scenario
            self.x[name] += values.values()
            self.x[EACH] += [] if values else [name]
            for metric, value in _costs(scenario, self.config.rounds).items():
                for own in (name, EACH)[: 1 if values else 2]:
                    found[metric][own].append(value)
        for metric, numbers in found.items():
            self.values[metric] = {name: np.array(values) for name, values in numbers.items()}

    def series(self, chart: Chart) -> dict[str, Array]:
        """Return the values of each series of a chart, in the unit of its metric's labels."""
        found = {}
        for name, said in chart.series.items():
            metric, text = ("delay_s", said) if isinstance(said, str) else said
            ours, baseline = _parts(self.values[metric], text)
            shown = ours / scale(metric) if baseline is None else 100 * ours / baseline
            found[name] = np.broadcast_to(shown, len(self.x[chart.x]))
        return found


def _costs(scenario: Scenario, rounds: int) -> dict[str, float]:
    memory_bytes = scenario.system.fleet.devices.memory_bytes
    costs = [scenario.timeline(index).cost for index in range(1, rounds + 1)]
    servers = np.mean([cost.server_memory_bytes.sum() for cost in costs])
    cloud = np.mean([cost.server_memory_bytes[0] for cost in costs])
    over = [(cost.device_memory_bytes > memory_bytes).any() for cost in costs]
    return {
        "delay_s": float(np.mean([cost.delay_s for cost in costs])),
        # That of its processor; its radio is not counted.
        "server_compute_j": float(np.mean([cost.server_compute_j.sum() for cost in costs])),
        "server_memory_bytes": float(servers),
        "cloud_memory_bytes": float(cloud),
        "edge_memory_bytes": float(servers - cloud),
        "rounds_over_memory": float(np.sum(over)),
    }


@dataclass(frozen=True)
class Spread:
    """A number of several seeds: ``-23.5 (-31.9 to -15.3)``."""

    values: tuple[float, ...]

    @property
    def range(self) -> tuple[float, float, float]:
        """Mean, least and largest."""
        return float(np.mean(self.values)), min(self.values), max(self.values)

    def __str__(self) -> str:
        # With one decimal, or as 1e-13 where that would be zero.
        small = [0 < abs(value) < 0.01 for value in self.range]
        mean, low, high = (
            f"{value:.0e}" if tiny else f"{value:.1f}"
            for value, tiny in zip(self.range, small, strict=True)
        )
        return mean if low == high else f"{mean} ({low} to {high})"


@dataclass(frozen=True)
class Row:
    """A figure over seeds: its words, and its numbers."""

    words: Figure
    ours: Spread
    against_strongest: Spread
    ours_better: Spread | None

    @classmethod
    def over(
        cls, figure: Figure, found: Sequence[Mapping[str, Values]], words: Mapping[str, object]
    ) -> "Row":
        """Return the row of a figure from the values of several seeds, with `words` in its own."""

        def spread(text: str | Sequence[str]) -> Spread:
            return Spread(tuple(number(values[figure.metric], text) for values in found))

        said = {name: getattr(figure, name).format_map(words) for name in _WORDS}
        return cls(
            replace(figure, **said),
            spread(figure.ours),
            spread(figure.against_strongest or figure.ours),
            spread(figure.ours_better) if figure.ours_better else None,
        )

    @property
    def passed(self) -> bool | None:
        """Whether the mean over the seeds is within the accepted range; None if there is none."""
        accepted = self.words.accepted
        return None if accepted is None else accepted[0] <= self.ours.range[0] <= accepted[1]


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
