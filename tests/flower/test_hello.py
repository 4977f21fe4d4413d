"""What a device says of its data before the first round."""

import shutil
from dataclasses import replace
from pathlib import Path

from fedsplit.apps.client_app import app as client_app

from fedsplit.data import DataSpec
from fedsplit.flower.server.roster import discover
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
