"""Path loss against worked values, its own geometry, and another implementation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.wireless import SCENARIOS, line_of_sight_probability, path_loss_db, shadowing_sigma_db

MODELS = sorted(SCENARIOS)
models = st.sampled_from(MODELS)


@pytest.mark.parametrize(
    ("model", "distance_m", "los", "carrier_hz", "loss_db"),
    [
        # Worked by hand from TR 38.901 Table 7.4.1-1 with the default heights.
        ("umi", 100.0, True, 3.5e9, 85.314),
        ("umi", 100.0, False, 3.5e9, 104.644),
        ("uma", 200.0, True, 2.0e9, 84.709),
        ("uma", 200.0, False, 2.0e9, 109.601),
        ("inh_open", 20.0, True, 4.0e9, 66.986),
        ("inh_mixed", 20.0, False, 4.0e9, 82.203),
        ("free_space", 1000.0, True, 2.4e9, 100.046),
        ("papers", 1000.0, True, 2.0e9, 128.1),
        ("papers", 100.0, True, 2.0e9, 90.5),
    ],
)
def test_loss_equals_worked_values(model, distance_m, los, carrier_hz, loss_db):
    assert path_loss_db(model, distance_m, los, carrier_hz) == pytest.approx(loss_db, abs=2e-3)


@given(model=models, seed=st.integers(0, 1000))
def test_loss_grows_with_distance_and_without_sight(model, seed):
    rng = np.random.default_rng(seed)
    distance = np.sort(rng.uniform(SCENARIOS[model].min_m, min(SCENARIOS[model].max_m, 2000), 50))
    for los in (True, False):
        assert np.all(np.diff(path_loss_db(model, distance, los, 2e9)) >= -1e-9)
    hidden = path_loss_db(model, distance, False, 2e9)
    assert np.all(hidden >= path_loss_db(model, distance, True, 2e9) - 1e-9)


@pytest.mark.parametrize("model", ["uma", "umi", "rma"])
def test_loss_has_no_jump_at_the_break_point(model):
    distance = np.geomspace(10, 4999, 200_000)
    assert np.max(np.diff(path_loss_db(model, distance, True, 2e9))) < 0.02


@given(model=models, distance=st.floats(0, 1e5))
def test_sight_is_a_probability_that_is_one_at_the_station(model, distance):
    assert 0 <= line_of_sight_probability(model, distance) <= 1
    assert line_of_sight_probability(model, 0.0) == 1


@pytest.mark.parametrize(
    ("model", "edges"), [("uma", [18]), ("umi", [18]), ("inh_mixed", [1.2]), ("inh_open", [5, 49])]
)
def test_sight_is_continuous_where_its_pieces_meet(model, edges):
    for edge in edges:
        left, right = line_of_sight_probability(model, [edge - 1e-6, edge + 1e-6])
        # The table's own constants meet to three digits only (0.537 and 0.54 at 49 m).
        assert left == pytest.approx(right, abs=5e-3)


def test_shadowing_spread_follows_sight_and_rural_break_point():
    assert shadowing_sigma_db("umi", [50.0, 50.0], [True, False], 2e9).tolist() == [4, 7.82]
    # Break point of a 35 m mast and a 1.5 m device at 2 GHz: 2.2 km.
    assert shadowing_sigma_db("rma", [2000.0, 2500.0], True, 2e9).tolist() == [4, 6]


def test_closer_than_the_model_holds_is_charged_its_shortest_distance():
    assert path_loss_db("uma", 0.0, True, 2e9) == path_loss_db("uma", 10.0, True, 2e9)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("moon", 1.0, True, 2e9), "path_loss='moon': must be one of uma"),
        (("uma", 6000.0, True, 2e9), "distance_m=6000.0: must be at most 5000"),
        (("uma", 100.0, True, 1e5), "carrier_hz=100000.0: must be in 5e\\+08..1e\\+11"),
        (("uma", np.nan, True, 2e9), "distance_m=nan"),
        (("uma", 10.0, True, 2e9, 25.0, 14.0), "device_m=14.0: must be in 1.5..13"),
    ],
)
def test_refused(arguments, named):
    with pytest.raises(FedsplitError, match=named):
        path_loss_db(*arguments)


def _sionna_scenario(model, distance_m, los, carrier_hz):
    """Set up Sionna's scenario with one station and one terminal per distance."""
    torch = pytest.importorskip("torch")
    phy = pytest.importorskip("sionna.phy.channel.tr38901")
    kind, extra = {
        "uma": (phy.UMa, {"o2i_model": "low"}),
        "umi": (phy.UMi, {"o2i_model": "low"}),
        "rma": (phy.RMa, {}),
        "inh_open": (phy.InH, {"indoor_scenario": "open"}),
        "inh_mixed": (phy.InH, {"indoor_scenario": "mixed"}),
    }[model]
    array = phy.PanelArray(1, 1, "single", "V", "omni", carrier_hz)
    channel = kind(
        carrier_frequency=carrier_hz,
        ut_array=array,
        bs_array=array,
        direction="uplink",
        enable_shadow_fading=False,
        precision="double",
        **extra,
    )
    heights = SCENARIOS[model]
    n = len(distance_m)
    terminals = torch.zeros(1, n, 3, dtype=torch.float64)
    terminals[0, :, 0] = torch.as_tensor(distance_m)
    terminals[0, :, 2] = heights.device_m
    station = torch.tensor([[[0.0, 0.0, heights.station_m]]], dtype=torch.float64)
    channel.set_topology(
        terminals,
        station,
        torch.zeros(1, n, 3, dtype=torch.float64),
        torch.zeros(1, 1, 3, dtype=torch.float64),
        torch.zeros(1, n, 3, dtype=torch.float64),
        torch.full((1, n), model.startswith("inh")),
        los,
    )
    return channel._scenario


@pytest.mark.parametrize("model", ["uma", "umi", "rma", "inh_open", "inh_mixed"])
@pytest.mark.parametrize("los", [True, False])
def test_agrees_with_sionna(model, los):
    """With `pip install fedsplit[sionna]`; Sionna's exact speed of light moves the break point."""
    pytest.importorskip("sionna")
    scenario = SCENARIOS[model]
    distance = np.geomspace(1.5 * scenario.min_m, 0.9 * scenario.max_m, 100)
    scenario = _sionna_scenario(model, distance, los, 3.5e9)
    theirs = scenario.basic_pathloss.reshape(-1).numpy()
    assert np.max(np.abs(path_loss_db(model, distance, los, 3.5e9) - theirs)) < 0.02
    sight = scenario.los_probability.reshape(-1).numpy()
    assert np.max(np.abs(line_of_sight_probability(model, distance) - sight)) < 1e-6
