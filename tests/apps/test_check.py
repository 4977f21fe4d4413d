"""What a scheme plans decides what a configuration may hold, whoever wrote the scheme."""

from pathlib import Path

import pytest
from fedsplit.apps.check import check
from fedsplit.apps.config import load_config
from fedsplit.apps.server_app import run_job

from fedsplit.errors import SettingsError
from fedsplit.flower import client_app
from fedsplit.report import read_records
from fedsplit.testing.grid import ThreadGrid

_MINE = '''
from dataclasses import replace

from fedsplit.plan import RoundPlan
from fedsplit.strategies.splitfed import SplitFed


class Mine(SplitFed):
    """The first device only infers."""

    def plan_round(self, scene):
        first, *others = (branch.turns[0] for branch in super().plan_round(scene).branches)
        return RoundPlan.parallel([replace(first, frozen=True), *others])


class Later(Mine):
    """The same from the second round on."""

    def plan_round(self, scene):
        return (SplitFed if scene.server_round < 2 else Mine).plan_round(self, scene)
'''
_TRAINS = "strategy=splitfed"
_INFERS = ("strategy=splitfrozen", "train.device_adapters=false", "strategy.name=mine")
_WRONG = (
    ("data.padding=longest", "data.padding='longest': must be fixed with devices that only infer"),
    ("codec=temporal", "codec.uplink.name='temporal': must be one without memory with devices"),
)


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a scheme of a user's own, as pip would."""
    (tmp_path / "freezes.py").write_text(_MINE)
    about = tmp_path / "freezes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: freezes\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[fedsplit.strategies]\nmine = freezes:Mine\nlater = freezes:Later\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("infers", _INFERS)
def test_devices_that_only_infer_are_known_by_the_plan(infers: str, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(f"Paragraph {n}." for n in range(200)))
    data = ["data=text", f"data.path={tmp_path / 'texts.txt'}", "data.partition=iid"]
    assert check(load_config([infers, *data]), tmp_path) is None
    for wrong, message in _WRONG:
        with pytest.raises(SettingsError) as refused:
            check(load_config([infers, *data, wrong]), tmp_path)
        assert str(refused.value).startswith(message)
        assert check(load_config([_TRAINS, *data, wrong]), tmp_path) is None


def test_a_scheme_whose_devices_only_infer_later_is_stopped_before_that_round(
    tiny_checkpoint: Path, tiny_text: Path, tmp_path: Path
) -> None:
    overrides = [
        f"model={tiny_checkpoint}", "model.r=2", "data=text", f"data.path={tiny_text}",
        "data.seq_len=16", "data.min_samples=4", "data.partition=iid", "data.padding=longest",
        "fleet.devices=2", "train.batch_size=2", "train.steps=1", "strategy.cut=1", "rounds=3",
        "run.accelerator=cpu", "strategy.name=later",
    ]  # fmt: skip
    config, folder = load_config(overrides), tmp_path / "run"
    assert check(config, folder) is None, "its first round is like any other"
    folder.mkdir()
    with pytest.raises(SettingsError, match=r"data\.padding='longest': must be fixed"):
        run_job(ThreadGrid(client_app(), 2), config, folder)
    assert [record.round for record in read_records(folder)] == [0, 1]
    assert "data.padding" in (folder / "error.txt").read_text()
