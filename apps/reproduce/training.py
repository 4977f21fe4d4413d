"""What ``fedsplit reproduce --train`` measures: the members of a paper's study, small and real."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from fedsplit.errors import FedsplitError
from fedsplit.report.studies.frame import Study
from fedsplit.report.studies.members import DONE

from ..config import load_config
from ..overrides import quoted
from ..plan import build_scenario
from ..study import run_members
from ..sweep import MEMBER, Member, named_members
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
    words = one.case.words
    more, note = _MORE.get(one.paper), trained(members, rounds)
    if more is not None:
        words |= more(one.case.config, numbers)
        note += str(words.pop("note", ""))
    rows = [Row.over(figure, [numbers], words) for figure in one.study.measured]
    return replace(one, rows=(*one.rows, *rows), notes=(*one.notes, note))


def trained(members: Sequence[Member], rounds: pd.DataFrame) -> str:
    """Return the loss of every member, and what it took, in words."""
    said = []
    for member in members:
        config = load_config(member.overrides)
        plan = build_scenario(config).plan_round(1)
        turns = [turn for branch in plan.branches for turn in branch.turns]
        own = rounds[rounds[MEMBER] == member.swept[MEMBER]]
        end = own.iloc[-1]
        said.append(
            f"{member.swept[MEMBER]} {end['eval_loss']:.4f} "
            f"(cuts {', '.join(str(turn.route.segments[0].stop) for turn in turns)} at first; "
            f"{len(own) - 1} rounds of {turns[0].steps} mini-batches a device, "
            f"{end['bytes_up.device'] / 1e6:.1f} MB up, {end['delay_s']:.1f} s modelled)"
        )
    source = str(config.model.source)
    model = "shipped model" if source.startswith("package:") else source
    return (
        f"Trained for real ({model}, {config.fleet.devices} devices, seed {config.seed}): "
        f"evaluation loss {rounds['eval_loss'].iloc[0]:.4f} nats before, then {'; '.join(said)}."
    )
