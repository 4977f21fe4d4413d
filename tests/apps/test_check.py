"""What a scheme plans decides what a configuration may hold, whoever wrote the scheme."""

from pathlib import Path

import pytest
from fedsplit.apps.check import check
from fedsplit.apps.config import load_config

from fedsplit.errors import SettingsError

_MINE = '''
from dataclasses import replace

from fedsplit.plan import RoundPlan
from fedsplit.strategies.splitfed import SplitFed


class Mine(SplitFed):
    """The first device only infers."""

    def plan_round(self, scene):
        first, *others = (branch.turns[0] for branch in super().plan_round(scene).branches)
        return RoundPlan.parallel([replace(first, frozen=True), *others])
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
    (about / "entry_points.txt").write_text("[fedsplit.strategies]\nmine = freezes:Mine\n")
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
