"""Links from ray tracers and network simulators, from small files as their own writers define them.

Sionna RT: ``a`` of ``sionna.rt.Paths.cir(out_type="numpy")``, complex ``[num_rx, num_rx_ant,
num_tx, num_tx_ant, num_paths, num_time_steps]``. DeepMIMO 4: a dataset's matrix ``power``, dBW
received of 0 dBW sent, ``[num_rx, num_paths]``, NaN where there is no path. ns-3: the lines of
src/lte/helper/phy-stats-calculator.cc.
"""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from fedsplit.errors import FedsplitError
from fedsplit.wireless import Channel, ChannelSpec, read_trace, uplink_bps
from fedsplit.wireless.trace import GAIN, SINR

DOWN = """% time\tcellId\tIMSI\tRNTI\trsrp\tsinr\tComponentCarrierId
0.1\t1\t1\t1\t1e-12\t10\t0
0.1\t1\t2\t2\t1e-12\t20\t0
0.2\t1\t1\t1\t1e-12\t11\t0
0.3\t1\t2\t2\t1e-12\t21\t0
0.3\t1\t2\t2\t1e-12\t99\t1
"""
UP = """% time\tcellId\tIMSI\tRNTI\tsinrLinear\tcomponentCarrierId
0.105\t1\t1\t1\t3\t0
0.205\t1\t2\t2\t7\t0
"""


@pytest.fixture
def sionna(tmp_path: Path) -> Path:
    """Three receivers of two antennas, one transmitter, two paths, four steps of 0.5 s."""
    a = np.zeros((3, 2, 1, 1, 2, 4), dtype=np.complex64)
    a[0, :, 0, 0, 0] = 1e-4 * np.array([1, 1, 2, 2])
    a[0, 0, 0, 0, 1] = 1e-4j
    a[1, :, 0, 0, 0] = 1e-5
    np.savez(tmp_path / "paths.npz", a=a, sampling_frequency=2.0)
    return tmp_path / "paths.npz"


def test_sionnas_gain_is_the_sum_over_paths_and_the_mean_over_antennas(sionna: Path) -> None:
    """Nothing reaches the third receiver, which is left out."""
    trace = read_trace(sionna)
    assert trace.kind == GAIN
    first = 1e-8 * np.array([1.5, 1.5, 4.5, 4.5])
    assert trace.down.values == pytest.approx(np.array([first, np.full(4, 1e-10)]).T)
    assert trace.down.times_s is not None
    assert trace.down.times_s.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert trace.up is trace.down


def test_gains_make_rates_by_the_configured_powers_and_noise(sionna: Path) -> None:
    spec = ChannelSpec(path_loss="trace", trace_file=str(sionna), step_interval_s=0.5)
    states = Channel(spec, np.zeros((4, 2))).realise_steps(0, 4)
    noise_w = 10 ** ((spec.noise_dbm_hz - 30) / 10) * spec.bandwidth_hz
    snr = 10 ** ((spec.device_dbm - 30) / 10) * 1e-8 * np.array([1.5, 1.5, 4.5, 4.5]) / noise_w
    rates = [uplink_bps(state, spec.bandwidth_hz) for state in states]
    assert [one[0] for one in rates] == pytest.approx(spec.bandwidth_hz * np.log2(1 + snr))
    assert all(one[2] == one[0] and one[3] == one[1] for one in rates)  # in rotation


@pytest.mark.parametrize("suffix", ["npz", "mat"])
def test_deepmimos_power_is_in_db_of_a_unit_sent(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"power_t001_tx000_r000.{suffix}"
    power = np.array([[-80.0, -80.0], [np.nan, np.nan], [-90.0, np.nan]])
    if suffix == "npz":
        np.savez(path, power=power)
    else:
        savemat(path, {"power": power})
    trace = read_trace(path)
    assert trace.kind == GAIN
    assert not trace.is_timed
    assert trace.down.values == pytest.approx(np.array([[2e-8, 1e-9]]))


def test_ns3s_ratios_hold_until_the_next_and_each_way_has_its_file(tmp_path: Path) -> None:
    down, up = tmp_path / "DlRsrpSinrStats.txt", tmp_path / "UlSinrStats.txt"
    down.write_text(DOWN)
    up.write_text(UP)
    trace = read_trace(down, up)
    assert trace.kind == SINR
    assert trace.down.values.tolist() == [[10, 20], [11, 20], [11, 21]]
    assert trace.up.values.tolist() == [[3, 7], [3, 7]]
    assert trace.down.times_s == pytest.approx(np.array([0.0, 0.1, 0.2]))
    spec = ChannelSpec(
        path_loss="trace", trace_file=str(down), trace_uplink_file=str(up), step_interval_s=0.1
    )
    state = Channel(spec, np.zeros((2, 2))).realise(0, 1)
    assert uplink_bps(state, 20e6) == pytest.approx(20e6 * np.log2(1 + np.array([3.0, 7.0])))


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"b": np.ones(1)}, "with an array a .* or power"),
        ({"a": np.ones((1, 1, 2, 1, 1, 1))}, "of shape .*, of one transmitter"),
        ({"a": np.ones((1, 1, 1, 1, 1, 2))}, "sampling_frequency=0.0: must be given"),
        ({"a": np.zeros((1, 1, 1, 1, 1, 1))}, "one that a path reaches"),
        ({"power": np.full((1, 1), np.nan)}, "one that a path reaches"),
        ({"power": np.full((2, 2, 2), -80.0)}, "of shape .num_rx, num_paths."),
        ({"power": np.full((1, 1), 3.0)}, "gain=1.99.*: must be above 0 and up to 1"),
    ],
)
def test_arrays_that_are_not_links_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], named: str
) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(FedsplitError, match=f"{path}.*{named}"):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("% time\tIMSI\n0\t1\n", "columns=.*with sinr"),
        (DOWN.replace("10\t0", "fast\t0"), "cannot be read as a trace of ns-3"),
        (DOWN.splitlines()[0], "values in a line=0"),
        (DOWN.replace("\t10\t0", "\t-1\t0"), "sinr=-1.0: must be above 0"),
    ],
)
def test_lines_that_ns3_does_not_write_are_refused(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "x.txt"
    path.write_text(text)
    with pytest.raises(FedsplitError, match=f"{path}.*{named}"):
        read_trace(path)


def test_two_files_must_be_of_one_kind_and_the_same_devices(tmp_path: Path, sionna: Path) -> None:
    down = tmp_path / "down.txt"
    down.write_text(DOWN)
    with pytest.raises(FedsplitError, match=f"{sionna}='gain': must be of the kind sinr"):
        read_trace(down, sionna)
    one = tmp_path / "one.txt"
    one.write_text("\n".join(UP.splitlines()[:2]))
    with pytest.raises(FedsplitError, match="devices=1: must be 2, as in"):
        read_trace(down, one)
