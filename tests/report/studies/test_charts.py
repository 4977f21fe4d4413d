"""Figures by the data behind them, and that they can be read."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedsplit.errors import SettingsError
from fedsplit.figures import COLOURS, label, scale, styles
from fedsplit.report.studies.charts import chart, front, latex, write
from fedsplit.report.studies.frame import Study
from fedsplit.report.studies.statistics import half_width


def test_lines_are_means_over_seeds_round_by_round(study: Study) -> None:
    data = chart(study, ["delay_s", "eval_loss"], by=["strategy"], ci=True).data
    assert data["group"].astype(str).tolist() == ["slow"] * 3 + ["quick"] * 3
    assert data["round"].tolist() == [0, 1, 2] * 2
    assert data["runs"].unique().tolist() == [3]
    assert data["delay_s"].tolist() == pytest.approx([0, 4.1, 8.2, 0, 1.1, 2.2])
    assert data["eval_loss"].tolist() == pytest.approx([4.1, 3.6, 3.1, 4.1, 3.9, 3.5])
    assert data["eval_loss.half_width"].iloc[-1] == pytest.approx(half_width([3.4, 3.3, 3.8]))


def test_bars_and_tables_are_of_the_ends(study: Study) -> None:
    data = chart(study, ["traffic_bytes"], kind="bar").data.set_index("group")
    assert data["traffic_bytes"].to_dict() == {"slow": 6e6, "quick": 6e6}
    text = latex(chart(study, ["eval_loss", "delay_s", "traffic_bytes"], kind="table"))
    assert text.splitlines()[2:7] == [
        r" & evaluation loss (nats per target) & modelled time (s) & modelled traffic (MB) \\",
        r"\midrule",
        r"slow & 3.1 $\pm$ 0.25 & 8.2 $\pm$ 0.5 & 6 $\pm$ 0 \\",
        r"quick & 3.5 $\pm$ 0.66 & 2.2 $\pm$ 0.5 & 6 $\pm$ 0 \\",
        r"\bottomrule",
    ]


def test_a_share_is_of_rounds_at_most_so_long(study: Study) -> None:
    data = chart(study, ["delay_s"], kind="cdf").data
    quick = data[data["group"] == "quick"]
    assert quick["delay_s"].tolist() == pytest.approx([1.0, 1.0, 1.1, 1.1, 1.2, 1.2])
    assert quick["share"].tolist() == pytest.approx(np.arange(1, 7) / 6)


def test_a_map_has_a_cell_for_each_pair_of_keys(study: Study) -> None:
    data = chart(study, ["strategy", "seed", "eval_loss"], kind="heat").data
    cells = data.set_index(["strategy", "seed"])["eval_loss"].to_dict()
    assert cells["quick", 2] == 3.8
    assert len(cells) == 6


def test_the_front_is_what_no_other_beats() -> None:
    draws = np.random.default_rng(0).integers(0, 5, (30, 2))
    points = pd.DataFrame(draws, columns=["delay_s", "accuracy"])
    for kept, point in zip(front(points, "delay_s", "accuracy"), draws, strict=True):
        beaten = [
            o for o in draws if o[0] <= point[0] and o[1] >= point[1] and tuple(o) != tuple(point)
        ]
        assert kept == (not beaten)


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(
    make: Callable[..., Study],
) -> None:
    keys = ("strategy", "seed", "channel.bandwidth_hz")
    study = make({("slow", 0, 5e6): [4.0, 3.0], ("slow", 0, 2e7): [4.0, 3.5]}, keys)
    with pytest.raises(SettingsError, match="with channel.bandwidth_hz too, in which runs differ"):
        chart(study, ["delay_s", "eval_loss"], by=["strategy"])
    both = chart(study, ["eval_loss"], kind="bar").data
    assert both["group"].astype(str).tolist() == ["bandwidth (Hz) 5e+06", "bandwidth (Hz) 2e+07"]
    one = chart(study, ["eval_loss"], kind="bar", where=["bandwidth_hz=5e6"]).data
    assert one["eval_loss"].tolist() == [3.0]
    with pytest.raises(SettingsError, match="--where='bandwidth_hz=1': must be of a run"):
        chart(study, ["eval_loss"], kind="bar", where=["bandwidth_hz=1"])


@pytest.mark.parametrize(
    ("names", "kind", "words"),
    [
        (["delay_s"], "line", "METRIC='delay_s': must be two metrics"),
        (["delay_s", "nonsense"], "line", "metric='nonsense': must be one of"),
        (["strategy", "strategy", "eval_loss"], "heat", "must be two keys and a metric"),
        (["nonsense"], "cdf", "metric='nonsense': must be one of"),
        (["delay_s"], "pie", "--kind='pie': must be one of line, cdf, bar, heat, pareto, table"),
        ([], "table", "METRIC='': must be metrics"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    study: Study, names: list[str], kind: str, words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        chart(study, names, kind=kind)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("line", ["delay_s", "eval_loss"]),
        ("cdf", ["delay_s"]),
        ("bar", ["eval_loss"]),
        ("heat", ["strategy", "seed", "eval_loss"]),
        ("pareto", ["delay_s", "eval_loss"]),
    ],
)
def test_a_figure_is_written_with_its_data_and_always_the_same(
    study: Study, tmp_path: Path, kind: str, names: list[str]
) -> None:
    made = chart(study, names, kind=kind, ci=True)
    paths = write(made, tmp_path / "out" / kind, ["svg"])
    assert [path.name for path in paths] == [f"{kind}.svg", f"{kind}.csv"]
    drawn = paths[0].read_bytes()
    assert write(made, tmp_path / "again", ["svg"])[0].read_bytes() == drawn
    with paths[1].open() as file:
        assert len(list(csv.DictReader(file))) == len(made.data)


def test_every_format_is_one(study: Study, tmp_path: Path) -> None:
    made = chart(study, ["eval_loss"], kind="bar")
    begins = {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}
    for path in write(made, tmp_path / "bar")[:-1]:
        assert path.read_bytes().startswith(begins[path.suffix[1:]])


def test_lines_differ_in_more_than_colour() -> None:
    looks = styles(24)
    for count in (2, 11):
        drawn = [(look["marker"], look["linestyle"]) for look in looks[:count]]
        assert len(set(drawn)) == count
    assert len({tuple(map(str, look.values())) for look in looks}) == 24


def test_no_colour_is_lost_on_white_paper() -> None:
    """The contrast of a thin line with paper: 2 is what the palette's lightest has."""
    for colour in COLOURS:
        parts = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 2.0, colour


@pytest.mark.parametrize(
    ("metric", "words", "size"),
    [
        ("delay_s", "modelled time (s)", 1.0),
        ("traffic_bytes", "modelled traffic (MB)", 1e6),
        ("bandwidth_hz", "bandwidth (Hz)", 1.0),
        ("own_peak_bytes", "own peak (MB)", 1e6),
        ("accuracy", "accuracy", 1.0),
    ],
)
def test_a_label_has_its_unit(metric: str, words: str, size: float) -> None:
    assert label(metric) == words
    assert scale(metric) == size
