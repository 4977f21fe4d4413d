"""Trace files: replayed as measured, and refused with the place of the mistake."""

import numpy as np
import pytest

from fedsplit.errors import FedsplitError
from fedsplit.wireless import Channel, ChannelSpec, downlink_bps, read_trace, uplink_bps

HEAD = "round,device,uplink_bps,downlink_bps\n"
TIMED = "time_s,device,uplink_bps,downlink_bps\n"
GOOD = HEAD + "0,1,2e6,8e6\n0,0,1e6,4e6\n1,0,3e6,5e6\n1,1,4e6,6e6\n"


@pytest.fixture
def trace_file(tmp_path):
    def write(text):
        path = tmp_path / "rates.csv"
        path.write_text(text)
        return str(path)

    return write


def test_lines_come_in_any_order(trace_file):
    trace = read_trace(trace_file(GOOD))
    assert trace.up.values.tolist() == [[1e6, 2e6], [3e6, 4e6]]
    assert trace.down.values.tolist() == [[4e6, 8e6], [5e6, 6e6]]


def test_channel_replays_the_measured_rates_in_a_circle(trace_file):
    spec = ChannelSpec(path_loss="trace", trace_file=trace_file(GOOD), bandwidth_hz=10e6)
    channel = Channel(spec, np.zeros((3, 2)))
    for round_ in range(4):
        state = channel.realise(round_)
        up, down = ([1e6, 2e6, 1e6], [4e6, 8e6, 4e6]) if round_ % 2 == 0 else (
            [3e6, 4e6, 3e6], [5e6, 6e6, 5e6])  # fmt: skip
        assert uplink_bps(state, 10e6) == pytest.approx(up, rel=1e-12)
        assert downlink_bps(state, 10e6) == pytest.approx(down, rel=1e-12)


def test_a_trace_knows_no_links_to_other_stations(trace_file):
    spec = ChannelSpec(path_loss="trace", trace_file=trace_file(GOOD), bandwidth_hz=10e6)
    state = Channel(spec, np.zeros((2, 2)), np.zeros((2, 2)), home=[0, 1]).realise(0)
    assert state.over([0, 1]) is state
    with pytest.raises(FedsplitError, match="edge=0 of device 1: must be 1, the only station"):
        state.over([0, 0])


def test_with_times_links_change_within_a_round(trace_file):
    """Rows at 0, 1 and 2 s; a round lasts 4 s and a step 1 s, so the second begins at 4 = 1 s."""
    lines = "".join(f"{time},0,{up}e6,1e6\n" for time, up in ((5, 1), (6, 2), (7, 3)))
    text = TIMED + lines
    spec = ChannelSpec(
        path_loss="trace",
        trace_file=trace_file(text),
        round_interval_s=4.0,
        step_interval_s=1.0,
    )
    channel = Channel(spec, np.zeros((2, 2)))
    for round_, expected in ((0, [1e6, 2e6, 3e6, 1e6, 2e6]), (1, [2e6, 3e6, 1e6])):
        states = channel.realise_steps(round_, len(expected))
        rates = [uplink_bps(state, spec.bandwidth_hz) for state in states]
        assert [one.tolist() for one in rates] == [pytest.approx([up, up]) for up in expected]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("round,device,uplink_bps\n0,0,1\n", "line 1: column downlink_bps is missing"),
        (HEAD, "at least one line"),
        (HEAD + "0,0,1e6,-5\n", "line 2: downlink_bps='-5': must be a number above 0 and up to"),
        (HEAD + "0,0,nan,5\n", "line 2: uplink_bps='nan'"),
        (HEAD + "0,0,1e13,5\n", "line 2: uplink_bps='1e13': .* up to 1e\\+12"),
        (HEAD + "0,0,fast,5\n", "line 2: uplink_bps='fast'"),
        (HEAD + "0,0,1\n", "line 2: downlink_bps=None"),
        (HEAD + "-1,0,1,1\n", "line 2: round='-1': must be a whole number from 0"),
        (HEAD + "0,0,1,1\n0,0,2,2\n", "line 3: round=0, device=0: repeated"),
        (HEAD + "0,0,1,1\n1,1,2,2\n", "round=0, device=1: missing"),
        ("time_s,device,uplink_bps,downlink_bps\n-1,0,1,1\n", "line 2: time_s='-1'"),
        (
            "time_s,device,uplink_bps,downlink_bps\n0,0,1,1\n2,1,1,1\n",
            "time_s=0, device=1: missing",
        ),
    ],
)
def test_mistakes_are_named(trace_file, text, named):
    path = trace_file(text)
    with pytest.raises(FedsplitError, match=f"{path}.*{named}"):
        read_trace(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FedsplitError, match=r"nowhere\.csv: cannot be read"):
        read_trace(tmp_path / "nowhere.csv")


def test_rate_beyond_any_band_is_refused(trace_file):
    spec = ChannelSpec(path_loss="trace", trace_file=trace_file(GOOD), bandwidth_hz=1e4)
    with pytest.raises(FedsplitError, match=r"rates\.csv: uplink_bps=4000000\.0: must be at most"):
        Channel(spec, np.zeros((2, 2)))
