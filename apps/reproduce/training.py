"""What ``fedsplit reproduce --train`` measures: the members of a paper's study, small and real."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from fedsplit.errors import FedsplitError
from fedsplit.report.studies.frame import Study
from fedsplit.report.studies.members import DONE

from ..overrides import quoted
from ..study import run_members
from ..sweep import MEMBER, named_members
from . import accuracy, memory
from .study import Findings, Row, Values

COMMON = ("rounds=2", "evaluate.every=1", "train.steps=6", "seed=0")
_MORE = {"splitllm": memory.add, "sft": accuracy.add}


def train(one: Findings, folder: Path, overrides: Sequence[str]) -> Findings:
    """Train the members of a paper's study in small, with the same seed; add what comes out.

    Parameters
    ----------
    one : Findings
        What the comparison found.
    folder : Path
        Where the study ``PAPER_trained`` goes, with a folder for each member.
    overrides : sequence of str
        Changes for all members: ``model=FOLDER`` in place of the shipped model.

    Raises
    ------
    FedsplitError
        If a run fails; names its folder.
    """
    place = folder.resolve() / f"{one.paper}_trained"
    typed = [text for text in overrides if not text.startswith(("output=", "paper."))]
    members = named_members([*COMMON, *typed, f"output={quoted(str(place))}"], one.study.train)
    # Progress belongs beside the tables, not in them: --json keeps standard output to itself.
    _, records = run_members(members, Console(file=sys.stderr))
    for record in records:
        if record.status != DONE:
            raise FedsplitError(f"training: the run in {place / record.folder} failed")
    rounds = Study.open(place).rounds
    last = rounds.groupby(MEMBER, sort=False).tail(1).set_index(MEMBER)
    numbers: dict[str, Values] = {
        name: {member: np.array(value) for member, value in last[name].items()}
        for name in last.select_dtypes("number")
    }
    losses = (f"{member} {loss:.4f}" for member, loss in last["eval_loss"].items())
    before = f"evaluation loss {rounds['eval_loss'].iloc[0]:.4f} nats before"
    note = f"Trained for real (`fedsplit report {place}`): {before}, then {', '.join(losses)}."
    if one.paper in _MORE:
        _MORE[one.paper](one.case, numbers)
    rows = [Row.over(figure, [numbers], one.case.words) for figure in one.study.measured]
    return replace(one, rows=(*one.rows, *rows), notes=(*one.notes, note))
