"""``fedsplit reproduce``: a paper's comparison on the modelled system, and its training in small.

The comparison takes seconds for each seed. It is described in conf/study/; its settings, and where
each comes from, are in conf/paper/.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fedsplit.errors import require, require_choice

from ..config import load_config
from . import card, fast, fedsllm, gsfl, sft
from .report import record, tables, write_files
from .study import Case, Findings, Row, read
from .training import train


def _splitllm(case: Case) -> None:
    """Cost all members; say how long a pass over all users takes."""
    fleet = case.config.fleet
    require(fleet.edges >= 1, "fleet.edges", fleet.edges, "at least 1")
    delay, rounds = case.cost()["delay_s"], -(-fleet.devices // fleet.edges)
    case.words |= {
        "saved": 1 - fleet.edges / fleet.devices,
        "rounds": rounds,
        "pass_s": rounds * delay["SplitLLM, K copies"].item(),
        "splitfed_s": delay["SplitFed, N copies"].item(),
    }


PAPERS: dict[str, Callable[[Case], None]] = {
    "splitllm": _splitllm,
    "sft": sft.add,
    "fedsllm": fedsllm.add,
    "fast": fast.add,
    "card": card.add,
    "gsfl": gsfl.add,
}
"""What fills in the numbers of a paper's case, and more words for its figures."""
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

    With `seeds`, counted from the configured one, whose mean is judged. ``model=`` in `overrides`
    is what is trained; all others change the comparison too, which is on conf/paper/PAPER.yaml.

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
    require(seeds >= 1, "seeds", seeds, "at least 1")
    models = [text for text in overrides if text.startswith("model=")]
    settings = [text for text in overrides if text not in models]
    for text in models:
        require(training, "model", text.partition("=")[2], "absent without --train")
    names = tuple(PAPERS) if paper == ALL else (paper,)
    default = f"outputs/reproduce_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    config = load_config([f"paper={names[0]}", *settings])
    folder, numbers = Path(config.output or default), range(config.seed, config.seed + seeds)
    found = [compare(name, settings, numbers) for name in names]
    if training:
        found = [train(one, folder, overrides) for one in found]
    write_files(found, folder)
    if as_json:
        print(json.dumps({one.paper: record(one) for one in found}))
    else:
        for table in tables(found):
            console.print(table)
        console.print(f"[bold]{folder}[/bold]", highlight=False)
    return 0 if all(row.passed is not False for one in found for row in one.rows) else _MISSED


def compare(paper: str, overrides: Sequence[str], seeds: Sequence[int]) -> Findings:
    """Make a paper's comparison with each of `seeds`; plots and remarks are of the first."""
    study = read(paper)
    cases = [Case(study, [*overrides, f"seed={seed}"]) for seed in seeds]
    for case in cases:
        PAPERS[paper](case)
    words = cases[0].words
    numbers = [case.values for case in cases]
    provenance = str(cases[0].config.paper.provenance).strip()
    changed = [text for text in overrides if not text.startswith(("output=", "seed="))]
    if changed:
        provenance += f"; CHANGED by you: {' '.join(changed)}"
    return Findings(
        paper=paper,
        study=study,
        case=cases[0],
        seeds=tuple(seeds),
        rows=tuple(Row.over(figure, numbers, words) for figure in study.figures),
        notes=tuple(note.format_map(words) for note in study.notes),
        provenance=provenance,
    )
