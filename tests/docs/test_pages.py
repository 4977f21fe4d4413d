"""What pages say of the code, and of one another, is so."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from fedsplit.schemes import Scheme, check
from fedsplit.testing.scenes import make_scene

from .pages import PAGES, ROOT, programs

README = (ROOT / "README.md").read_text()
MODULES = sorted(
    {name for page in PAGES for name in re.findall(r"python -m ([\w.]+\w)", page.read_text())}
)
LINKS = [
    (page, target.partition("#")[0])
    for page in PAGES
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    if not target.startswith(("http", "#"))
]
IMPORTS = sorted(
    {
        line
        for page in PAGES
        for program in programs(page)
        for line in re.findall(r"^from fedsplit[\w.]* import .*$", program, re.MULTILINE)
    }
)


def test_every_link_leads_somewhere() -> None:
    assert [(page.name, to) for page, to in LINKS if not (page.parent / to).exists()] == []


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith(".NAME")])
def test_every_module_that_a_page_starts_is_there(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_the_readme_names_every_benchmark() -> None:
    listed = re.findall(r"`(\w+)`", README[README.index("- benchmarks:") :])
    there = {file.stem for file in (ROOT / "benchmarks").glob("[a-z]*.py")}
    assert there == set(listed)


def test_the_readme_names_every_scheme() -> None:
    listed = re.findall(r"^\| `(\w+)` \| .* \|$", README, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(listed) == set(project["entry-points"]["fedsplit.strategies"])


def test_architecture_shows_the_layers_that_are_checked() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page[page.index("## Layers") : page.index("## The parts")]
    shown = re.findall(r"^    (\S+(?: \| \S+)*)", section, re.MULTILINE)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert shown == contracts["contracts"][0]["layers"]


@pytest.mark.parametrize("line", IMPORTS)
def test_what_a_page_imports_is_there(line: str) -> None:
    exec(line, {})


def test_the_scheme_in_the_readme_plans() -> None:
    (program,) = programs(ROOT / "README.md")
    names: dict[str, type[Scheme]] = {}
    exec(program, names)
    scene = make_scene()
    assert check(names["MyScheme"]().plan_round(scene), scene).devices == scene.devices


def test_the_test_of_the_library_page_passes() -> None:
    (program,) = (item for item in programs(ROOT / "docs" / "library.md") if "make_scene" in item)
    (scheme,) = programs(ROOT / "README.md")
    exec(scheme + program, {})


def _settings(page: Path) -> set[str]:
    return set(re.findall(r"`((?:run|link|data|fleet|train|evaluate)\.\w+)[`=]", page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_a_page_names_is_in_the_configuration(page: Path) -> None:
    conf = ROOT / "conf"
    for setting in _settings(page):
        group, name = setting.split(".")
        files = [conf / "config.yaml", *(conf / group).glob("*.yaml")]
        assert any(re.search(rf"^\s*{name}:", file.read_text(), re.MULTILINE) for file in files), (
            setting
        )
