"""``fedsplit audit``: from overrides to a table, on the shipped model."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fedsplit.apps.audit import Server, audit
from fedsplit.apps.config import load_config, model_spec
from fedsplit.apps.values import plain
from rich.console import Console

from fedsplit.flower.server.checkpoint import Checkpoint, save_checkpoint
from fedsplit.models import load
from fedsplit.plan import DEVICE, Segment

FEW = Server(counts=(12,), private=4)
SMALL = ["data.seq_len=32", "train.batch_size=4"]


def audited(
    words: list[str], folder: Path, multirun: bool = False
) -> tuple[list[dict[str, Any]], str]:
    """Return what an audit left, and what it printed."""
    text = io.StringIO()
    console = Console(file=text, width=160)
    assert audit(words, multirun=multirun, server=FEW, console=console, output=folder) == 0
    assert {file.name for file in folder.iterdir()} == {
        "audit.json", "audit.csv", "audit.png", "audit.pdf"
    }  # fmt: skip
    return json.loads((folder / "audit.json").read_text())["audits"], text.getvalue()


def reads(found: dict[str, Any], attack: str) -> float:
    return next(item["tokens"] for item in found["attacks"] if item["attack"] == attack)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Return the audit of an undefended boundary, and what it printed."""
    found, said = audited(SMALL, tmp_path_factory.mktemp("bare"))
    return found[0], said


def test_a_boundary_is_read_unless_noise_drowns_it(
    bare: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    found, said = bare
    assert reads(found, "ridge") > 0.4
    assert 0 < found["update"]["tokens"] <= 1
    assert "different tokens (guessing: " in said
    assert found["labels"] == found["told"] == 1.0
    assert "100% of the labels are sent to the server" in said
    words = said.replace("private text's tokens", "").replace("private tokens", "")
    assert "private" not in words  # nothing is ever called so
    noise = ["privacy=noise", "privacy.noise_multiplier=50", "privacy.unit=token"]
    (drowned,), _ = audited([*SMALL, *noise], tmp_path)
    assert reads(drowned, "ridge") < 0.2
    assert drowned["defence"] == "clip 50, noise 50 per token"


def test_a_u_shape_keeps_labels_home_but_its_gradients_tell_them(tmp_path: Path) -> None:
    found, said = audited([*SMALL, "strategy.tail=1"], tmp_path)
    assert found[0]["labels"] > 0.5
    assert "can be read from the gradients that come back" in said


def test_a_sweep_is_a_row_for_each_configuration(tmp_path: Path) -> None:
    words = [*SMALL, "strategy.cut=1,3", "codec=int8"]
    found, _ = audited(words, tmp_path, multirun=True)
    kinds = [(item["name"], item["cut"], item["codec"].partition("(")[0]) for item in found]
    assert kinds == [("cut=1", 1, "int8"), ("cut=3", 3, "int8")]


def test_a_run_is_attacked_with_the_adapters_that_it_came_to(
    bare: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = load_config(SMALL)
    (run / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    model = load(model_spec(config))
    adapters = model.adapters(Segment(DEVICE, 0, model.n_blocks))
    wild = {name: value + 3.0 for name, value in adapters.items()}
    save_checkpoint(run, Checkpoint(1, wild, {}))
    found, said = audited([str(run)], tmp_path / "audit")
    assert found[0]["norm"] != pytest.approx(bare[0]["norm"], rel=1e-3)
    # They are so far off that a turn's gradients overflow: there is no change to read.
    assert "must be finite" in found[0]["update"]["why_not"]
    assert "a turn of this model fails" in said
