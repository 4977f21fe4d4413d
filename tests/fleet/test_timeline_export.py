"""The exported files hold the timeline, in the formats that their readers expect."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from matplotlib.image import imread

from fedsplit.figures import PAGE_IN
from fedsplit.fleet import timeline, write_chrome_trace, write_gantt, write_json
from fedsplit.fleet.export import MAX_GANTT_ROWS
from tests.fleet.fleet_scenarios import rounds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@settings(max_examples=30, deadline=None)
@given(scenario=rounds())
def test_trace_rows_never_overlap(folder, scenario):
    """Perfetto drops slices of a thread that overlap without nesting."""
    line = timeline(*scenario, 8)
    for detail in (False, True):
        write_chrome_trace(line, folder / "trace.json", detail)
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
        slices = [event for event in events if event["ph"] == "X"]
        names = [event for event in events if event["ph"] == "M"]
        assert len(slices) == len(line.activities(detail))
        rows = {}
        for event in slices:
            rows.setdefault((event["pid"], event["tid"]), []).append(event)
        threads = {(e["pid"], e["tid"]) for e in names if e["name"] == "thread_name"}
        assert threads == set(rows)
        for row in rows.values():
            row.sort(key=lambda event: event["ts"])
            for before, after in pairwise(row):
                assert after["ts"] >= before["ts"] + before["dur"] - 1e-3
        end = max(event["ts"] + event["dur"] for event in slices)
        assert end == pytest.approx(1e6 * line.cost.delay_s)


@settings(max_examples=10, deadline=None)
@given(scenario=rounds())
def test_json_adds_up(folder, scenario):
    line = timeline(*scenario, 8)
    write_json(line, folder / "timeline.json", detail=True)
    record = json.loads((folder / "timeline.json").read_text())
    energy = sum(activity["energy_j"] for activity in record["activities"])
    assert energy == pytest.approx(record["cost"]["energy_j"])
    assert record["cost"]["delay_s"] == line.cost.delay_s
    assert len(record["cost"]["uplink_bytes"]) == scenario[2].n_devices


@settings(max_examples=3, deadline=None)
@given(scenario=rounds())
def test_gantt_is_a_picture_of_a_bounded_size(folder, scenario):
    write_gantt(timeline(*scenario, 8), folder / "gantt.png")
    height, width, _ = imread(folder / "gantt.png").shape
    assert width == int(300 * PAGE_IN)
    assert 300 < height <= 300 * (1.0 + 0.16 * MAX_GANTT_ROWS) + 1
