"""What a run finds around it: proxies, clusters, long and missing folders, namesakes of modules.

All that can be had together is had together, in two runs; ``-m slow`` tries Flower's engine too.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.running import start, tiny_job

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

NOBODY = "http://127.0.0.1:9"
ADVERSE = {
    **dict.fromkeys(
        ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOBODY
    ),
    "RAY_ADDRESS": "127.0.0.1:9",
    "LANG": "C",
    "LC_ALL": "C",
}
OWN_SCHEME = """
from flwr.serverapp.strategy import FedAvg

class FedMine(FedAvg):
    pass
"""
# Modules of the project, of its libraries, of the standard library.
NAMESAKES = ("apps.py", "psutil.py", "torch.py", "rich.py", "yaml.py", "random.py", "queue.py")


@pytest.fixture
def namesakes(tmp_path: Path) -> Path:
    """Return a folder of modules named like those that a run needs; and a scheme of the user's."""
    folder = tmp_path / "it's mine"
    for package in ("apps", "strategies"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise SystemExit('impostor')")
    (folder / "conf").mkdir()
    (folder / "conf" / "config.yaml").write_text("rounds: 77")
    for name in NAMESAKES:
        (folder / name).write_text("raise SystemExit('impostor')")
    (folder / "users_own.py").write_text(OWN_SCHEME)
    return folder


@pytest.fixture
def long_tmp() -> Iterator[Path]:
    """Yield a folder for temporary files with a path of 110 characters."""
    base = Path(tempfile.mkdtemp(dir="/tmp"))
    folder = base / ("t" * (109 - len(str(base))))
    folder.mkdir()
    yield folder
    shutil.rmtree(base)


@pytest.fixture
def job(tiny_checkpoint: Path, tiny_text: Path) -> list[str]:
    return tiny_job(tiny_checkpoint, tiny_text)


def finish(
    job: list[str], cwd: Path, changes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> str:
    monkeypatch.delenv("HOME", raising=False)
    process = start(job, cwd, changes)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert "impostor" not in output
    return output


ENGINES = ["embedded", pytest.param("flower", marks=pytest.mark.slow)]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_working_folder_is_one_of_namesakes(
    job: list[str],
    namesakes: Path,
    long_tmp: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
) -> None:
    changes = {**ADVERSE, "TMPDIR": str(long_tmp)}
    output = tmp_path / "é = (out)"
    finish([*job, f"run.engine={engine}", f"output='{output}'"], namesakes, changes, monkeypatch)
    assert (output / "adapter").is_dir()
    assert list(long_tmp.iterdir()) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_pythonpath_holds_namesakes_and_the_working_folder_is_read_only(
    job: list[str],
    namesakes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
) -> None:
    """A scheme of the user's own on PYTHONPATH is found all the same."""
    path = os.pathsep.join(filter(None, (str(namesakes), os.environ.get("PYTHONPATH"))))
    own = "aggregator._target_=users_own.FedMine"
    finish(
        [*job, own, f"run.engine={engine}", f"output={tmp_path / 'out'}"],
        Path("/proc"),
        {**ADVERSE, "PYTHONPATH": path},
        monkeypatch,
    )
