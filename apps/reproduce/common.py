"""What a paper's comparison is made of, and the scenarios that it compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from omegaconf import DictConfig

from ..config import load_config
from ..plan import Scenario, build_scenario


@dataclass(frozen=True)
class Figure:
    """One number of a paper beside ours.

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
    accepted : tuple of float or None
        Range of `ours` that counts as reproduced; None if the figure is for information.
    ours_better : float or None
        The same change with fedsplit's own options.
    better : str
        What those options are.
    unit : str
        Of `ours` and `ours_better`: percent of the baseline, or percentage points.
    """

    name: str
    claim: str
    versus: str
    ours: float
    accepted: tuple[float, float] | None = None
    ours_better: float | None = None
    better: str = ""
    unit: str = "%"

    @property
    def passed(self) -> bool:
        """Whether the figure is within its accepted range, or has none."""
        return self.accepted is None or self.accepted[0] <= self.ours <= self.accepted[1]


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
    """What came out for a paper.

    Parameters
    ----------
    paper : str
        Its short name.
    figures : tuple of Figure
        The rows of the table.
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
