"""The notebook runs as it stands, with fewer seeds and rounds."""

from pathlib import Path

import nbformat
import pytest

nbclient = pytest.importorskip("nbclient")
NOTEBOOK = Path(__file__).parents[2] / "examples" / "loss_against_time.ipynb"
SMALL = 'schemes, seeds, rounds, steps = ["splitfed", "gsfl"], [0, 1], 1, 1\noutput = "small"'


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(900)
def test_it_makes_its_figure(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    parameters.source = SMALL
    client = nbclient.NotebookClient(
        notebook, timeout=800, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert (tmp_path / "small" / "loss_against_time.pdf").read_bytes().startswith(b"%PDF")
    table = notebook.cells[-2].outputs[-1]["data"]["text/plain"]
    assert "splitfed" in table
    assert "gsfl" in table


def test_it_is_kept_executed() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in out.get("data", {}) for cell in code for out in cell.outputs)
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)
