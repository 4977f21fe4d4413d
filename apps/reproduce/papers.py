"""``fedsplit reproduce``: a paper's comparison on the modelled system, and its training in small.

The comparison takes seconds. Settings and where each comes from are in conf/paper/.
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
from .common import Reproduction
from .report import figures_table, provenance_table, record, write_files
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
_MISSED = 1


def reproduce(
    paper: str, overrides: Sequence[str], as_json: bool, training: bool, console: Console
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

    Returns
    -------
    int
        0; 1 if a figure is outside the range in which it counts as reproduced.

    Raises
    ------
    FedsplitError
        If the paper or an override is unknown.
    """
    require_choice("paper", paper, (ALL, *PAPERS))
    names = tuple(PAPERS) if paper == ALL else (paper,)
    default = f"outputs/reproduce_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    folder = Path(load_config(overrides).output or default)
    found = []
    for name in names:
        one = PAPERS[name](overrides)
        settings = [text for text in overrides if not text.startswith("output=")]
        if settings:
            changed = f"{one.provenance.strip()}; CHANGED by you: {' '.join(settings)}"
            one = replace(one, provenance=changed)
        if training:
            measured = train(name, folder)
            one = replace(
                one,
                figures=(*one.figures, *measured.figures),
                notes=(*one.notes, *measured.notes),
            )
        found.append(one)
    write_files(found, folder)
    if as_json:
        print(json.dumps({one.paper: record(one) for one in found}))
    else:
        console.print(figures_table(found))
        console.print(provenance_table(found))
        console.print(f"[bold]{folder}[/bold]", highlight=False)
    return 0 if all(figure.passed for one in found for figure in one.figures) else _MISSED
