"""``fedsplit plan``: sweeps, files, and mistakes by name. No model is trained."""

import csv
import json
from dataclasses import replace
from io import StringIO

import pytest
from fedsplit.apps.cli import main
from fedsplit.apps.config import load_config
from fedsplit.apps.plan import build_scenario, plan
from rich.console import Console

from fedsplit.errors import FedsplitError
from fedsplit.measured import MeasuredProfile


def printed(overrides, multirun=False):
    console = Console(file=StringIO(), width=80)
    assert plan(overrides, multirun, console) == 0
    return console.file.getvalue()


def test_comparison_of_schemes_and_bands(tmp_path):
    text = printed(
        [
            f"output={tmp_path}",
            "strategy=splitfed,vanilla,fedlora",
            "channel.bandwidth_hz=5e6,20e6",
            "rounds=3",
        ],
        multirun=True,
    )
    assert "strategy=vanilla" in text
    assert str(tmp_path.name) in text.replace("\n", "")
    record = json.loads((tmp_path / "plan.json").read_text())
    assert len(record) == 6
    for name, scenario in record.items():
        total = sum(row["delay_s"] for row in scenario["rounds"])
        assert scenario["total"]["delay_s"] == pytest.approx(total)
        assert scenario["total"]["rounds"] == 3
        wide = record[name.replace("bandwidth_hz=5e+06", "bandwidth_hz=2e+07")]
        assert wide["total"]["delay_s"] <= total
    with (tmp_path / "plan.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6 * 3
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_a_single_scenario_leaves_its_timeline(tmp_path):
    printed([f"output={tmp_path}", "rounds=2", "fleet=hierarchical"])
    trace = json.loads((tmp_path / "trace.json").read_text())
    cost = json.loads((tmp_path / "timeline.json").read_text())["cost"]
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert len(trace["traceEvents"]) > 100
    assert len(cost["uplink_bytes"]) == 20
    assert next(iter(rows.values()))["rounds"][0]["delay_s"] == cost["delay_s"]
    assert (tmp_path / "gantt.png").stat().st_size > 1000


def test_the_server_is_as_fast_as_its_file_says(tmp_path):
    plain = build_scenario(load_config([])).system
    n_units = plain.profile.n_blocks + 2
    machine = MeasuredProfile(
        model="any", seq_len=128, batch=4, forward_s=(0.1,) * n_units, backward_s=(0.2,) * n_units
    )
    machine.write(tmp_path / "server.json")
    named = f"fleet.server_profile={tmp_path / 'server.json'}"
    found = build_scenario(load_config([named])).system
    assert found.fleet.servers.flops[0] == pytest.approx(machine.flops_per_s(found.profile))
    assert (found.fleet.devices.flops == plain.fleet.devices.flops).all()
    replace(machine, seq_len=64).write(tmp_path / "server.json")
    with pytest.raises(FedsplitError, match=r"server_profile=.*: must be of .* with 128 tokens"):
        build_scenario(load_config([named]))


def test_rounds_are_planned_independently_of_each_other():
    config = load_config(["fleet=heterogeneous", "channel=umi", "channel.mobility.enabled=true"])
    late_first, in_order = build_scenario(config), build_scenario(config)
    seventh = late_first.plan_round(7)
    assert [in_order.plan_round(r) for r in range(1, 8)][-1] == seventh


def test_a_smaller_codec_sends_less():
    plain, small = (
        build_scenario(load_config([f"codec={name}"])).rows(1)[0] for name in ("identity", "int8")
    )
    assert 3 < plain.uplink_bytes / small.uplink_bytes < 4.5


def test_a_machine_that_is_too_small_is_counted(tmp_path):
    tiny = "{flops_per_cycle: 512, min_hz: 1e8, max_hz: 1e9, memory_bytes: 1e6, power_w: 5}"
    overrides = [f"+fleet.processors.tiny={tiny}".replace(": ", ":"), "fleet.types=[tiny]"]
    assert build_scenario(load_config(overrides)).rows(1)[0].devices_over_memory == 4
    assert "more than the machine has" in printed([f"output={tmp_path}", *overrides])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["channel.bandwidth_hz=-1"], r"channel.bandwidth_hz=-1.0: must be finite and above 0"),
        (
            ["channel=umi", "channel.fading.kind=fog"],
            r"channel.fading.kind='fog': must be one",
        ),
        (["+channel.antennas=4"], r"channel.antennas=4: must be a known setting"),
        (["channel=trace"], r"channel.trace_file=None: must be a CSV file"),
        (["channel=trace", "channel.trace_file=no.csv"], r"no\.csv: cannot be read"),
        (["fleet=hierarchical", "fleet.edges=-1"], r"fleet.edges=-1: must be"),
        (["fleet.types=[abacus]"], r"fleet.types='abacus': must be one of jetson"),
        (["rounds=0"], "rounds=0: must be at least 1"),
        (["channel=nowhere"], "channel='nowhere': must be one of"),
    ],
)
def test_mistakes_name_field_and_range(overrides, named):
    with pytest.raises(FedsplitError, match=named):
        plan(overrides, False, Console(file=StringIO()))


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_cut_that_the_model_forbids_is_refused_before_anything_starts(command, capsys):
    """With tied embeddings, which are trained here, head and embeddings need one tier."""
    tied = ["model.train=full", "+model.config.tie_word_embeddings=true"]
    assert main([command, *tied, "strategy.cut=2"]) == 2
    assert "route=device[0:2] -> server[2:6]" in (error := capsys.readouterr().err)
    assert "possible two-tier cuts: none" in " ".join(error.split())
    assert main([command, "strategy.cut=6"]) == 2
    assert "the last cut must be at most 5" in " ".join(capsys.readouterr().err.split())
