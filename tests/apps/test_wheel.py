"""What is installed: one package at the top level, with schemes, command line and configuration."""

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Return the wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_nothing_but_fedsplit_is_at_the_top_level(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"fedsplit"}


def test_all_that_is_registered_is_inside(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(entry_points).decode())
    values = [value for section in parser.sections() for value in parser[section].values()]
    targets = [value.split(":")[0] for value in values]
    assert len(targets) > 11
    for target in targets:
        assert f"{target.replace('.', '/')}.py" in names


def test_every_file_of_the_configuration_and_the_model_is_inside(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert f"fedsplit/apps/conf/{file.relative_to(ROOT / 'conf').as_posix()}" in names
    for file in (ROOT / "fedsplit" / "assets" / "docstring-llama").iterdir():
        assert f"fedsplit/assets/docstring-llama/{file.name}" in names


def test_it_runs_without_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """In a folder with namesakes, from the unpacked wheel alone."""
    wheel.extractall(tmp_path / "site")
    (tmp_path / "apps").mkdir()
    for name in ("apps/__init__.py", "strategies.py", "conf.py"):
        (tmp_path / name).write_text("raise SystemExit('not ours')\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); "
        "import fedsplit; assert 'site' in fedsplit.__file__; "
        "from fedsplit.apps.cli import main; from fedsplit.schemes import find_scheme; "
        "import fedsplit.strategies.splitfed; raise SystemExit(main(['run', '--cfg']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "optimizer" in done.stdout
