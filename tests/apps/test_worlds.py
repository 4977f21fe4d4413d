"""The world of a run in figures: who has which labels, who stands where, and the data behind."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fedsplit.apps.cli import main
from fedsplit.apps.config import load_config
from fedsplit.apps.values import plain
from fedsplit.apps.worlds import gain_map, label_counts, world

from fedsplit.data import DataSpec, load_data
from fedsplit.errors import SettingsError
from fedsplit.fleet import FleetSpec, build_fleet
from fedsplit.report import RoundRecord, RunReport
from fedsplit.report.studies.charts import write
from fedsplit.report.studies.frame import Study
from fedsplit.wireless import Channel, ChannelSpec

GOLDEN = [1, 11, 3, 11, 0, 15, 2, 10, 24, 22]
GAIN_DB = -86.36744
DIGITS = DataSpec(source="digits", partition="dirichlet", alpha=0.3, max_samples=300)


def test_labels_are_counted_as_the_partition_divides_them() -> None:
    held = load_data(DIGITS, None, 3, seed=0)
    data = label_counts(held).data
    for device in range(3):
        labels = pd.Series([held._train[index].group for index in held.train_indices[device]])
        own = data[data["device"] == device].set_index("label")["examples"]
        assert own.to_dict() == labels.value_counts().reindex(range(10), fill_value=0).to_dict()
    # Golden: what a Dirichlet(0.3) draw of seed 0 gives, in the order of labels.
    assert data[data["device"] == 0]["examples"].tolist() == GOLDEN
    even = label_counts(load_data(replace(DIGITS, partition="iid"), None, 3, seed=0)).data

    def spread(of: pd.DataFrame) -> float:
        return float(of.groupby("label")["examples"].std().mean())

    assert spread(even) < spread(data) / 2


def test_a_map_has_every_node_where_it_stands_and_its_gain() -> None:
    fleet = build_fleet(FleetSpec(devices=5, edges=2), 0)
    spec = ChannelSpec(shadowing_db=0.0)
    channel = Channel(spec, fleet.devices.positions_m, fleet.stations_m, 0, fleet.home)
    data = gain_map(fleet, channel).data
    devices, stations = (data[data["node"] == node] for node in ("device", "station"))
    assert stations[["x_m", "y_m"]].to_numpy() == pytest.approx(fleet.stations_m)
    assert stations["gain_db"].isna().all()
    assert devices[["x_m", "y_m"]].to_numpy() == pytest.approx(fleet.devices.positions_m)
    assert devices["station"].tolist() == fleet.home.tolist()
    # Without shadowing, who is nearer to its station has the better gain.
    home = fleet.stations_m[fleet.home]
    far_m = np.linalg.norm(fleet.devices.positions_m - home, axis=1)
    assert np.argsort(far_m).tolist() == np.argsort(-devices["gain_db"].to_numpy()).tolist()
    assert devices["gain_db"].iloc[0] == pytest.approx(GAIN_DB)


def ran(folder: Path, *overrides: str) -> Path:
    """Leave what a run has left that evaluated once."""
    RunReport(folder, plain(load_config(overrides)), 1).add_round(RoundRecord(0, eval_loss=2.0))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return ran(tmp_path / "run", "model=vit", "data=digits", "data.partition=dirichlet")


def test_the_command_draws_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, rows in (("labels", 4 * 10), ("map", 4 + 1)):
        assert main(["plot", str(run), "--kind", kind, "--format", "svg"]) == 0
        assert len(pd.read_csv(run / "figures" / f"{kind}.csv")) == rows
        drawn = run / "figures" / f"{kind}.svg"
        first = drawn.read_bytes()
        assert main(["plot", str(run), "--kind", kind, "--format", "svg"]) == 0
        assert drawn.read_bytes() == first
    assert "labels.svg" in capsys.readouterr().out


def test_texts_without_labels_are_counted_as_the_run_wrote_them_down(tmp_path: Path) -> None:
    folder = ran(tmp_path / "texts")
    assert main(["plot", str(folder), "--kind", "labels"]) == 2  # it wrote nothing down
    results = json.loads((folder / "results.json").read_text())
    results["data"] = {"devices": {"0": {"train-samples": 7}, "1": {"train-samples": 9}}}
    (folder / "results.json").write_text(json.dumps(results))
    data = world(Study.open(folder), "labels").data
    assert data.to_dict("list") == {"group": ["device 0", "device 1"], "samples": [7, 9]}


def test_of_many_devices_few_are_named(tmp_path: Path) -> None:
    held = load_data(replace(DIGITS, max_samples=None), None, 60, seed=0)
    drawn = write(label_counts(held), tmp_path / "many", ["svg"])[0].read_text()
    assert drawn.count('id="text_') < 40


def test_only_a_world_without_metrics_is_drawn(run: Path) -> None:
    assert main(["plot", str(run), "delay_s", "--kind", "map"]) == 2
    with pytest.raises(SettingsError, match="--kind='globe': must be one of labels, map"):
        world(Study.open(run), "globe")
