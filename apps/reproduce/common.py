"""What a paper's comparison is made of, and the scenarios that it compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from omegaconf import DictConfig

from fedsplit.errors import require

from ..config import load_config
from ..plan import Scenario, build_scenario


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a paper beside ours, for one seed.

    Parameters
    ----------
    name : str
        What is compared.
    claim : str
        The paper's number, with its version where versions differ; "none" for a comparison that
        the paper does not make.
    versus : str
        The baseline.
    ours : float
        Our change against the baseline.
    strongest : str
        The strongest baseline that an honest referee would ask for.
    against_strongest : float
        Our change against that one.
    gain : str
        What the gain comes from.
    tuned : str
        What was chosen with the claim in view, and by whom; "nothing" if nothing was.
    accepted : tuple of float or None
        Range of `ours` that counts as reproduced; None if the figure is for information.
    ours_better : float or None
        The change against `versus` with fedsplit's own options.
    better : str
        What those options are.
    unit : str
        Of all changes: percent of the baseline, or percentage points.
    """

    name: str
    claim: str
    versus: str
    ours: float
    strongest: str
    against_strongest: float
    gain: str
    tuned: str = "nothing"
    accepted: tuple[float, float] | None = None
    ours_better: float | None = None
    better: str = ""
    unit: str = "%"


@dataclass(frozen=True)
class Chart:
    """A plot: bars where `x` holds names, on top of each other if `stacked`, else lines."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[str] | Sequence[float]
    series: Mapping[str, Sequence[float]]
    stacked: bool = False


@dataclass(frozen=True)
class Reproduction:
    """What came out for a paper with one seed.

    Parameters
    ----------
    paper : str
        Its short name.
    figures : tuple of Figure
        The same comparisons in the same order, whatever the seed.
    charts : tuple of Chart
        Plots like the paper's.
    notes : tuple of str
        What must be known to read the figures.
    provenance : str
        Where the settings come from.
    """

    paper: str
    figures: tuple[Figure, ...]
    charts: tuple[Chart, ...]
    notes: tuple[str, ...]
    provenance: str


@dataclass(frozen=True)
class Spread:
    """A figure of several seeds: ``-23.5 (-31.9 to -15.3)``."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def low(self) -> float:
        """The least of them."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest of them."""
        return max(self.values)

    def __str__(self) -> str:
        mean, low, high = map(_number, (self.mean, self.low, self.high))
        return mean if low == high else f"{mean} ({low} to {high})"


@dataclass(frozen=True)
class Row:
    """A figure over seeds.

    Parameters
    ----------
    words : Figure
        The figure of the first seed, for all that is not a number.
    ours, against_strongest : Spread
        The changes.
    ours_better : Spread or None
        The change with fedsplit's own options.
    """

    words: Figure
    ours: Spread
    against_strongest: Spread
    ours_better: Spread | None

    @classmethod
    def over(cls, figures: Sequence[Figure]) -> "Row":
        """Return the row of the same figure from several seeds."""
        better = [figure.ours_better for figure in figures if figure.ours_better is not None]
        return cls(
            figures[0],
            Spread(tuple(figure.ours for figure in figures)),
            Spread(tuple(figure.against_strongest for figure in figures)),
            Spread(tuple(better)) if better else None,
        )

    @property
    def passed(self) -> bool:
        """Whether the mean over the seeds is within the accepted range, or there is none."""
        accepted = self.words.accepted
        return accepted is None or accepted[0] <= self.ours.mean <= accepted[1]

    @property
    def verdict(self) -> str:
        """ "-" for information, "yes" or "MISSED"."""
        if self.words.accepted is None:
            return "-"
        return "yes" if self.passed else "MISSED"


@dataclass(frozen=True)
class Findings:
    """What came out for a paper over all seeds; plots and notes are those of the first.

    Parameters
    ----------
    paper, provenance
        As of `Reproduction`.
    seeds : tuple of int
        The seeds of `rows`.
    rows : tuple of Row
        One for each comparison.
    charts, notes
        As of `Reproduction`.
    """

    paper: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    charts: tuple[Chart, ...]
    notes: tuple[str, ...]
    provenance: str

    @classmethod
    def over(cls, seeds: Sequence[int], found: Sequence[Reproduction]) -> "Findings":
        """Join what came out for each of `seeds`."""
        first = found[0]
        figures = zip(*(one.figures for one in found), strict=True)
        rows = tuple(Row.over(same) for same in figures)
        return cls(first.paper, tuple(seeds), rows, first.charts, first.notes, first.provenance)


def seeds_of(overrides: Sequence[str], count: int) -> range:
    """Return `count` seeds from the configured one, which is 0 by default.

    Raises
    ------
    FedsplitError
        If there is no seed at all, or an override is wrong.
    """
    require(count >= 1, "seeds", count, "at least 1")
    first = int(load_config(overrides).seed)
    return range(first, first + count)


def paper_config(paper: str, overrides: Sequence[str], *changes: str) -> DictConfig:
    """Return the configuration of a paper's comparison, changed by the user, then by `changes`."""
    return load_config([f"+paper={paper}", *overrides, *changes])


def paper_scenario(paper: str, overrides: Sequence[str], *changes: str) -> Scenario:
    """Return the scheme and system that `paper_config` describes."""
    return build_scenario(paper_config(paper, overrides, *changes))


def round_delays_s(scenario: Scenario, rounds: int) -> np.ndarray:
    """Return the delay of each of the first rounds, shape ``[rounds]``."""
    delays = [scenario.timeline(index).cost.delay_s for index in range(1, rounds + 1)]
    return np.array(delays)


def change(ours: float, baseline: float) -> float:
    """Return by how many percent `ours` differs from `baseline`; negative is less."""
    return 100 * (ours / baseline - 1)


def _number(value: float) -> str:
    """Return a percentage with one decimal, or as 1e-13 where that would be zero."""
    return f"{value:.0e}" if 0 < abs(value) < 0.01 else f"{value:.1f}"
