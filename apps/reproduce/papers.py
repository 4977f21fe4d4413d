"""``fedsplit reproduce``: a paper's comparison on the modelled system, and its training in small.

The comparison takes seconds for each seed. Settings and where each comes from are in conf/paper/.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fedsplit.errors import require_choice

from ..config import load_config
from . import card, fast, fedsllm, gsfl, sft, splitllm
from .common import Findings, Reproduction, Row, seeds_of
from .report import figures_table, gains_table, provenance_table, record, write_files
from .training import train

PAPERS: dict[str, Callable[[Sequence[str]], Reproduction]] = {
    module.PAPER: module.reproduce
    for module in (
        splitllm,
        sft,
        fedsllm,
        fast,
        card,
        gsfl,
    )
}
ALL = "all"
SEEDS = 5
_MISSED = 1


def reproduce(
    paper: str,
    overrides: Sequence[str],
    console: Console,
    *,
    as_json: bool,
    training: bool,
    seeds: int = SEEDS,
) -> int:
    """Make a paper's comparison, or all; print it and leave tables and plots in a folder.

    Parameters
    ----------
    paper : str
        A key of `PAPERS`, or "all".
    overrides : sequence of str
        Hydra overrides over conf/paper/PAPER.yaml.
    as_json : bool
        Print one JSON object in place of the tables.
    training : bool
        Also train small models with each scheme and its baselines, for minutes.
    console : Console
        Where to print.
    seeds : int
        How many seeds to repeat the comparison with, counted from the configured one.

    Returns
    -------
    int
        0; 1 if the mean over seeds of a figure is outside the range in which it counts as
        reproduced.

    Raises
    ------
    FedsplitError
        If the paper or an override is unknown, or there is no seed.
    """
    require_choice("paper", paper, (ALL, *PAPERS))
    numbers = seeds_of(overrides, seeds)
    names = tuple(PAPERS) if paper == ALL else (paper,)
    default = f"outputs/reproduce_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    folder = Path(load_config(overrides).output or default)
    found = []
    for name in names:
        one = compare(name, overrides, numbers)
        if training:
            measured = train(name, folder)
            one = replace(
                one,
                rows=(*one.rows, *(Row.over([figure]) for figure in measured.figures)),
                notes=(*one.notes, *measured.notes),
            )
        found.append(one)
    write_files(found, folder)
    if as_json:
        print(json.dumps({one.paper: record(one) for one in found}))
    else:
        for table in (figures_table, gains_table, provenance_table):
            console.print(table(found))
        console.print(f"[bold]{folder}[/bold]", highlight=False)
    return 0 if all(row.passed for one in found for row in one.rows) else _MISSED


def compare(paper: str, overrides: Sequence[str], seeds: Sequence[int]) -> Findings:
    """Make a paper's comparison with each of `seeds`."""
    one = Findings.over(seeds, [PAPERS[paper]([*overrides, f"seed={seed}"]) for seed in seeds])
    settings = [text for text in overrides if not text.startswith(("output=", "seed="))]
    if not settings:
        return one
    changed = f"{one.provenance.strip()}; CHANGED by you: {' '.join(settings)}"
    return replace(one, provenance=changed)
