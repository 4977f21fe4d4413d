"""Commands as a user types them, in this process, in a folder of their own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fedsplit.apps.cli import main
from fedsplit.apps.launch import run as launching

Typed = Callable[[list[str]], tuple[int, str, str]]


class Started(Exception):
    """Flower would have been started now."""


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Return a function that types a command: exit code (-1 where Flower starts), both outputs."""

    def start(*_: object, **__: object) -> None:
        raise Started

    monkeypatch.setattr(launching.Engine, "carry_out", start)

    def run(words: list[str]) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(words)
        except Started:
            code = -1
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty working folder, which is the user's home too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path
