"""What devices are asked before the first round, and what they say of their data."""

import shutil
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from fedsplit.apps.client_app import app as client_app
from flwr.app import Message

from fedsplit.data import DataSpec
from fedsplit.errors import FedsplitError
from fedsplit.flower.messages import read_task
from fedsplit.flower.server import roster as nodes
from fedsplit.flower.server.roster import discover
from fedsplit.flower.tasks import Job
from fedsplit.patience import Patience
from fedsplit.testing.grid import ThreadGrid
from tests.flower.conftest import N_DEVICES, Federation


def test_the_files_of_a_named_folder_that_were_not_read_are_listed(
    federation: Federation, tiny_text: Path, tmp_path: Path
) -> None:
    for file in [tiny_text] if tiny_text.is_file() else tiny_text.iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "notes.md").write_text("not data")
    (tmp_path / "empty.txt").touch()
    data = DataSpec(source="text", path=str(tmp_path), seq_len=16, min_samples=4)
    roster = discover(ThreadGrid(client_app, N_DEVICES), replace(federation.job, data=data))
    for node in roster.nodes:
        assert [item.rpartition("/")[2] for item in node.left_out] == [
            "empty.txt (empty)",
            "notes.md (not .txt, .csv, .tsv, .json, .jsonl, .parquet)",
        ]


class _Counting(ThreadGrid):
    """Keeps how many messages were under way whenever one more was sent, with it."""

    def submit(self, message: Message) -> Future[Message]:
        self.under_way = max(getattr(self, "under_way", 0), len(self._replies) + 1)
        return super().submit(message)


@pytest.mark.parametrize(("places", "most"), [(1, 2), (None, N_DEVICES)])
def test_who_would_wait_for_a_place_is_asked_later(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, places: int | None, most: int
) -> None:
    """What is under way does not grow with a simulation; machines are asked at once."""
    monkeypatch.setattr(nodes, "_ASKED_AT_ONCE", 2)
    grid = _Counting(client_app, N_DEVICES)
    roster = discover(grid, federation.job, places=places)
    assert [node.index for node in roster.nodes] == list(range(N_DEVICES))
    assert grid.under_way == most


def test_the_job_is_written_and_read_once_however_many_are_told(federation: Federation) -> None:
    grid = ThreadGrid(client_app, N_DEVICES)
    discover(grid, federation.job)
    assert len({id(message.content["task"]["json"]) for message in grid.sent}) == 1
    first, *others = [read_task(message, Job) for message in grid.sent]
    assert first == federation.job
    assert all(other is first for other in others)


def test_devices_that_come_one_after_the_other_are_all_waited_for(federation: Federation) -> None:
    """A place that is taken by others is nobody's fault: patience is with the next that comes."""
    job = replace(federation.job, patience=Patience(connect_s=2.0))

    def slowly(*_: object) -> None:
        time.sleep(1.0)

    started = time.monotonic()
    assert len(discover(ThreadGrid(client_app, N_DEVICES, 1, slowly), job).nodes) == N_DEVICES
    assert time.monotonic() - started > 2 * job.patience.connect_s - 1


def test_of_many_that_are_missing_few_are_named(federation: Federation) -> None:
    job = replace(federation.job, n_devices=20, patience=Patience(connect_s=0.2))

    def dead(*_: object) -> None:
        raise RuntimeError("battery empty")

    numbers = ", ".join(str(index) for index in range(10))
    with pytest.raises(FedsplitError, match=f"^fleet: device {numbers} and 10 more is missing"):
        discover(ThreadGrid(client_app, N_DEVICES, disturb=dead), job)
