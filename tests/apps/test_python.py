"""The commands as functions: light to import, and the same numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fedsplit.apps.python import _texts
from fedsplit.apps.sweep import members

import fedsplit
from fedsplit.errors import FedsplitError
from tests.system.running import tiny_job

HEAVY = ("torch", "hydra", "pandas", "numpy", "flwr", "matplotlib")


def test_importing_fedsplit_alone_brings_nothing_else() -> None:
    program = f"import sys, fedsplit; print([n for n in {HEAVY} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_plan_is_the_function_although_a_module_is_called_so() -> None:
    program = "import fedsplit; from fedsplit.plan import Turn; import fedsplit.plan; "
    program += "assert Turn.__module__ == 'fedsplit.plan'; print(fedsplit.plan.__doc__[:8])"
    done = subprocess.run(
        [sys.executable, "-Werror", "-c", program], capture_output=True, text=True
    )
    assert done.stdout.strip() == "Say what", done.stderr


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (3, "rounds=3"),
        (1e-3, "rounds=0.001"),
        (True, "rounds=true"),
        (None, "rounds=null"),
        ([0, 1], "rounds=0,1"),
        (range(2), "rounds=0,1"),
        (["sft", "gsfl"], "rounds=sft,gsfl"),
        ("null", "rounds='null'"),
        ("a b,c", "rounds='a b,c'"),
    ],
)
def test_a_value_is_written_as_it_would_be_typed(value: object, written: str) -> None:
    assert _texts([], {"rounds": value}) == [written]


def test_a_text_is_one_value_and_a_list_several() -> None:
    found = members(_texts([], {"strategy": ["sft", "gsfl"], "output": "a,b"}), multirun=True)
    assert [member.values() for member in found] == [{"strategy": "sft"}, {"strategy": "gsfl"}]
    assert [member.folder for member in found] == ["strategy=sft", "strategy=gsfl"]


def test_planning_gives_a_row_per_scenario_and_round() -> None:
    table = fedsplit.plan("channel.bandwidth_hz=5e6,20e6", strategy="vanilla", rounds=2)
    assert table[["channel.bandwidth_hz", "round"]].to_numpy().tolist() == [
        [5e6, 1],
        [5e6, 2],
        [2e7, 1],
        [2e7, 2],
    ]
    assert table["delay_s"].iloc[0] > table["delay_s"].iloc[2] > 0
    with pytest.raises(FedsplitError, match="rounds=0: must be at least 1"):
        fedsplit.plan(rounds=0)


@pytest.mark.system
def test_a_run_gives_its_rounds(tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path) -> None:
    job = tiny_job(tiny_checkpoint, tiny_text)
    study = fedsplit.run(*job, output=str(tmp_path / "out"), quiet=True)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["rounds"]
    assert study.rounds["eval_loss"].tolist() == [item["eval_loss"] for item in results]
    assert {"train.loss", "train.bytes_up"} <= set(study.frame["metric"])
