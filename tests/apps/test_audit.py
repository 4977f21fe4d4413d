"""``fedsplit audit``: from overrides to a table, on the shipped model."""

import io
import json
from pathlib import Path

import pytest
import yaml
from fedsplit.apps.audit import Server, audit
from fedsplit.apps.config import load_config
from fedsplit.apps.values import plain
from rich.console import Console

from fedsplit.flower.server.checkpoint import Checkpoint, save_checkpoint
from fedsplit.models import load
from fedsplit.plan import DEVICE, Segment

FEW = Server(counts=(6,), private=4)
SMALL = ["data.seq_len=32", "train.batch_size=4"]


def audited(words: list[str], folder: Path, multirun: bool = False) -> tuple[list[dict], str]:  # type: ignore[type-arg]
    """Return what an audit left, and what it printed."""
    text = io.StringIO()
    console = Console(file=text, width=160)
    assert audit(words, multirun=multirun, server=FEW, console=console, output=folder) == 0
    assert {file.name for file in folder.iterdir()} == {
        "audit.json", "audit.csv", "audit.png", "audit.pdf"
    }  # fmt: skip
    return json.loads((folder / "audit.json").read_text())["audits"], text.getvalue()


def reads(found: dict, attack: str) -> float:  # type: ignore[type-arg]
    return next(item["tokens"] for item in found["attacks"] if item["attack"] == attack)


def test_a_boundary_is_read_unless_noise_drowns_it(tmp_path: Path) -> None:
    noise = "privacy={clip: 10, noise_multiplier: 0.0, unit: token}"
    drowned = "privacy={clip: 10, noise_multiplier: 50, unit: token}"
    bare, said = audited(SMALL, tmp_path / "bare")
    both = [audited([*SMALL, word], tmp_path / word[-20:-1])[0][0] for word in (noise, drowned)]
    assert reads(bare[0], "ridge") > 0.5
    assert reads(both[0], "ridge") > 0.5
    assert reads(both[1], "ridge") < 0.25
    assert bare[0]["labels"] == bare[0]["told"] == 1.0
    assert "100% of the labels are sent to the server" in said
    assert "private" not in said.replace("private text's tokens", "").replace("private tokens", "")


def test_a_u_shape_keeps_labels_home_but_its_gradients_tell_them(tmp_path: Path) -> None:
    found, said = audited([*SMALL, "strategy.tail=0"], tmp_path / "u")
    assert found[0]["labels"] > 0.8
    assert "can be read from the gradients that come back" in said


def test_a_sweep_is_a_row_for_each_configuration(tmp_path: Path) -> None:
    found, _ = audited(
        [*SMALL, "strategy.cut=1,3", "codec=identity,int8"], tmp_path / "sweep", multirun=True
    )
    kinds = [(item["cut"], item["codec"].partition("(")[0]) for item in found]
    assert kinds == [(1, "identity"), (1, "int8"), (3, "identity"), (3, "int8")]


def test_a_run_is_attacked_with_the_adapters_that_it_came_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = load_config(SMALL)
    (run / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    from fedsplit.apps.config import model_spec

    model = load(model_spec(config))
    adapters = model.adapters(Segment(DEVICE, 0, model.n_blocks))
    wild = {name: value + 3.0 for name, value in adapters.items()}
    save_checkpoint(run, Checkpoint(1, wild, {}))
    found, _ = audited([str(run)], tmp_path / "audit")
    fresh, _ = audited(SMALL, tmp_path / "fresh")
    assert found[0]["norm"] != pytest.approx(fresh[0]["norm"], rel=1e-3)
