"""Wrong inputs over all commands: one line, exit code 2, nothing started, nothing written."""

import shlex
from pathlib import Path

import pytest

from .conftest import Typed
from .places import broken
from .wrong_inputs import WRONG


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with broken files; no command may change it."""
    folder = tmp_path_factory.mktemp("broken")
    broken(folder)
    return folder


@pytest.fixture
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder, which has broken files."""
    monkeypatch.chdir(folder)
    return folder


def files(folder: Path) -> list[Path]:
    """Return all that is in `folder`, but for the lock of a run that is looked at."""
    return sorted(path for path in folder.rglob("*") if path.name != ".lock")


@pytest.mark.parametrize(("command", "text"), WRONG, ids=[command for command, _ in WRONG])
def test_a_wrong_input_is_refused_in_one_line(
    command: str, text: str, there: Path, typed: Typed
) -> None:
    before = files(there)
    code, _, error = typed(shlex.split(command))
    assert text in error
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "\x1b" not in error
    assert files(there) == before


def test_the_table_is_long_and_over_all_commands() -> None:
    commands = {shlex.split(command)[0] for command, _ in WRONG if command}
    assert len(WRONG) >= 200
    assert {"run", "plan", "calibrate", "deploy", "reproduce"} <= commands
