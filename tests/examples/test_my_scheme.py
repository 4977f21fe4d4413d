"""The example plugin installs as any package does, and is then found by its name."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fedsplit.apps.config import load_config
from fedsplit.apps.scenario import build_system

from fedsplit.errors import FedsplitError
from fedsplit.flower import SplitStrategy

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_scheme"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the example is installed in, without any network."""
    # The build leaves files beside the sources.
    sources = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("sources") / "my_scheme")
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", folder]
    done = run("pip", "install", *map(str, options), str(sources))
    assert done.returncode == 0, done.stderr
    return folder


def test_the_plugin_is_small() -> None:
    (module,) = EXAMPLE.glob("*.py")
    assert len(module.read_text().splitlines()) <= 40


def test_the_documentation_shows_it_as_it_is() -> None:
    page = (ROOT / "docs" / "write_a_strategy.md").read_text()
    for name in ("my_scheme.py", "pyproject.toml"):
        assert (EXAMPLE / name).read_text() in page


def test_it_plans_under_its_name(installed: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    done = run(
        "fedsplit.apps", "plan", "strategy=my_scheme", "+strategy.share=0.9", "rounds=1",
        f"output={tmp_path}", PYTHONPATH=path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (rows,) = json.loads((tmp_path / "plan.json").read_text()).values()
    assert rows["rounds"][0]["delay_s"] > 0


@pytest.fixture
def scheme(monkeypatch: pytest.MonkeyPatch) -> type[SplitStrategy]:
    """Return the scheme from its sources."""
    monkeypatch.syspath_prepend(EXAMPLE)
    return importlib.import_module("my_scheme").MyScheme


def test_faster_devices_keep_more_blocks(scheme: type[SplitStrategy]) -> None:
    system = build_system(load_config(["fleet=heterogeneous"]))
    scene = system.scene(1, dict.fromkeys(range(20), 100))
    plan = scheme(share=0.9).plan_round(scene)
    speed = scene.fleet.devices.flops
    turns = [branch.turns[0] for branch in plan.branches]
    cuts = [turn.route.cuts[0] for turn in sorted(turns, key=lambda turn: speed[turn.device])]
    assert cuts == sorted(cuts)
    assert 1 <= cuts[0] < cuts[-1] == 5


def test_its_own_checks_name_the_setting(scheme: type[SplitStrategy]) -> None:
    with pytest.raises(FedsplitError, match="strategy.share=2: must be from 0 to 1"):
        scheme(share=2)
