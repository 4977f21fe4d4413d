"""``fedsplit run -m``: real runs; nothing is run twice, and one that is wrong ends no other."""

import json
import os
import signal
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from fedsplit.apps.launch.engine import Engine
from fedsplit.apps.study import run_study
from rich.console import Console

from fedsplit.errors import FedsplitError
from fedsplit.report.lock import locked
from fedsplit.report.studies.members import read_members
from tests.system.running import start, tiny_job, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


def studied(overrides: list[str]) -> tuple[int, str]:
    console = Console(file=StringIO(), width=200)
    code = run_study(overrides, console)
    return code, console.file.getvalue()


def finished(folder: Path) -> bool:
    results = folder / "results.json"
    return results.exists() and "summary" in json.loads(results.read_text())


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on_and_no_member_is_run_twice(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    job = tiny_job(tiny_checkpoint, tiny_text)
    study = tmp_path / "study"
    sweep = [*job, "strategy=splitfed,nonsense", "seed=0,1", f"output={study}"]
    # `strategy.cut` of the job comes before the scheme, which does not matter.
    first = study / "strategy=splitfed,seed=0"
    begun = start(["-m", *sweep], tmp_path)
    wait_until(lambda: finished(first) or begun.poll() is not None)
    os.kill(begun.pid, signal.SIGKILL)
    begun.communicate()
    written = (first / "results.json").stat().st_mtime_ns
    # The lock is held until the last process of the killed command is gone.
    wait_until(lambda: _is_free(sweep), 60)

    code, shown = studied(sweep)
    assert code == 1
    assert shown.count("is complete") == 1
    assert "refused: strategy='nonsense': must be one of" in shown
    assert (first / "results.json").stat().st_mtime_ns == written
    members = read_members(study)
    assert [member.status for member in members] == ["done", "done", "refused", "refused"]

    table = pd.read_parquet(study / "table.parquet")
    assert table["run"].unique().tolist() == [member.name for member in members[:2]]
    assert table["seed"].unique().tolist() == [0, 1]
    assert table["round"].unique().tolist() == [0, 1]
    last = table[(table["metric"] == "eval_loss") & (table["round"] == 1)]
    for member, value in zip(members[:2], last["value"], strict=True):
        results = json.loads((study / member.folder / "results.json").read_text())
        assert results["rounds"][1]["eval_loss"] == value

    # One more seed, later: only that one is run.
    code, shown = studied([text.replace("seed=0,1", "seed=0,1,2") for text in sweep])
    assert shown.count("is complete") == 2
    assert [member.status for member in read_members(study)].count("done") == 3


def test_a_run_that_nobody_waits_for_is_not_taken_for_the_next(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Whoever watches a run may fail: the next one has a root of its own."""

    def fail() -> None:
        raise RuntimeError("no more")

    overrides = tiny_job(tiny_checkpoint, tiny_text)
    with Engine() as engine:
        for number, watch in enumerate((fail, lambda: None)):
            output = tmp_path / str(number)
            output.mkdir()
            with locked(output) as lock, suppress(RuntimeError):
                cause = engine.carry_out(
                    engine="embedded",
                    overrides=overrides,
                    output=output,
                    devices=2,
                    places=2,
                    log=output / "log",
                    keep_open=lock,
                    watch=watch,
                )
    assert cause is None
    assert finished(output)
    assert not finished(tmp_path / "0")


def _is_free(sweep: list[str]) -> bool:
    folder = Path(sweep[-1].partition("=")[2])
    try:
        for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            with locked(place):
                pass
    except FedsplitError:
        return False
    return True


def test_if_all_are_wrong_in_the_same_way_it_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(FedsplitError, match="rounds=0: must be at least 1"):
        studied(["seed=0,1", "rounds=0", f"output={tmp_path / 'study'}"])
    assert not (tmp_path / "study").exists()


def test_a_folder_of_other_runs_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(FedsplitError, match="holds a single run"):
        studied(["seed=0,1", f"output={tmp_path}"])
