"""``fedsplit plan --check``: how far the model was from what a run measured."""

from io import StringIO
from pathlib import Path

import pytest
from fedsplit.apps.cli import main
from fedsplit.apps.plan_check import check_run
from fedsplit.apps.records import phases
from rich.console import Console

from fedsplit.errors import FedsplitError
from fedsplit.report import RoundRecord, RunReport, TurnRow


def row(device: int, measured: tuple[float, float], modelled: tuple[float, float]) -> TurnRow:
    return TurnRow(
        round=1,
        phase="train",
        device=device,
        compute_s=measured[0],
        link_s=measured[1],
        wall_s=sum(measured) + 0.5,
        modelled_compute_s=modelled[0],
        modelled_link_s=modelled[1],
    )


ROWS = [row(0, (2.0, 4.0), (3.0, 4.0)), row(1, (2.0, 4.0), (1.0, 2.0))]


def test_phases_are_summed_over_turns_that_trained():
    evaluated = TurnRow(round=1, phase="evaluate", device=0, compute_s=9.0)
    assert phases([*ROWS, evaluated]) == {
        "compute": {"measured_s": 4.0, "modelled_s": 4.0},
        "link": {"measured_s": 8.0, "modelled_s": 6.0},
        "wait": {"measured_s": 1.0, "modelled_s": 0.0},
    }
    assert phases([evaluated]) is None


def test_it_says_by_phase_and_device_how_far_the_model_was_off(tmp_path: Path):
    RunReport(tmp_path, {}, 1).add_round(RoundRecord(1, phases=phases(ROWS)), ROWS)
    console = Console(file=StringIO(), width=100)
    assert check_run(tmp_path, console) == 0
    said = console.file.getvalue()  # type: ignore[attr-defined]
    lines = {line.split()[0]: line.split() for line in said.splitlines() if line.strip()}
    assert lines["compute"][1:4] == ["4", "4", "+0.0%"]
    assert lines["link"][1:4] == ["8", "6", "-25.0%"]
    assert "device 0 is furthest off: +50.0%" in said


def test_a_folder_without_modelled_turns_is_refused(tmp_path: Path):
    RunReport(tmp_path, {}, 1).add_round(
        RoundRecord(0), [TurnRow(round=0, phase="evaluate", device=0)]
    )
    with pytest.raises(FedsplitError, match="--check=.*a run that trained a turn"):
        check_run(tmp_path, Console(file=StringIO()))
    assert main(["plan", "--check", str(tmp_path), "rounds=2"]) == 2
    assert main(["plan", "--check", str(tmp_path / "nowhere")]) == 2
