"""What the documentation tells its reader to type, and what it says will be printed."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OUTPUT = re.compile(
    r"^<!-- output: (?P<command>.*?) -->\n```text\n(?P<lines>.*?)^```$", re.MULTILINE | re.DOTALL
)
# What a command does to the shell is for those behind it: they belong together.
_CHANGES_THE_SHELL = re.compile(r"^(cd |export |\w+=|\w+\(\) \{)| && cd ", re.MULTILINE)
_COMMENT = re.compile(r"\s+# .*$")
_INDENTED = re.compile(r"^ {4}(fedsplit|flwr|flower-\w+|pip|python3?|pytest) ", re.MULTILINE)


@dataclass(frozen=True)
class Output:
    """What a page says that the command which begins with `command` prints."""

    page: Path
    command: str
    lines: tuple[str, ...]


def commands(page: Path) -> list[str]:
    """Return the commands of a page, one by one, or as a block where they share a shell."""
    return [command for block in _SHELL.findall(page.read_text()) for command in _commands(block)]


def _commands(block: str) -> list[str]:
    if _CHANGES_THE_SHELL.search(block):
        return [block.strip()]
    lines = (_COMMENT.sub("", line) for line in block.replace("\\\n", " ").splitlines())
    parts = (part for line in lines for part in line.split(" && "))
    return [" ".join(part.split()) for part in parts if part.strip()]


def outputs(page: Path) -> list[Output]:
    """Return what a page says that commands print."""
    return [
        Output(page, found["command"], tuple(found["lines"].splitlines()))
        for found in _OUTPUT.finditer(page.read_text())
    ]


def programs(page: Path) -> list[str]:
    """Return the Python of a page."""
    return _PYTHON.findall(page.read_text())


def unmarked(page: Path) -> list[str]:
    """Return commands in blocks that are not marked as a shell's."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return _INDENTED.findall(text)
