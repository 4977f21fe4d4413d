"""The example of a scheme is what its page shows, and passes the tests that the page shows.

tests/docs installs it and plans with it, by the page's own commands.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import programs

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_scheme"
PAGE = ROOT / "docs" / "write_a_strategy.md"
HEAVY = ("torch", "transformers", "flwr", "fedsplit.apps")


def test_the_scheme_is_small() -> None:
    (module,) = EXAMPLE.glob("*.py")
    assert len(module.read_text().splitlines()) <= 28


def test_the_documentation_shows_it_as_it_is() -> None:
    page = PAGE.read_text()
    for name in ("my_scheme.py", "pyproject.toml"):
        assert (EXAMPLE / name).read_text() in page


def test_the_tests_of_the_page_pass_without_torch_flower_or_the_apps(tmp_path: Path) -> None:
    (tests,) = (program for program in programs(PAGE) if "def test_" in program)
    (tmp_path / "test_page.py").write_text(tests)
    run = (
        "import sys, pytest; code = pytest.main(['-q', '-p', 'no:cacheprovider', 'test_page.py']); "
        f"print('loaded', *[name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", run],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLE), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{tests.count('def test_')} passed" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["loaded"]
