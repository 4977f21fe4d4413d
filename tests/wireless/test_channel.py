"""The channel as a pure function of seed and time, with the physics of its parts."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.errors import FedsplitError
from fedsplit.wireless import (
    Channel,
    ChannelSpec,
    FadingSpec,
    MobilitySpec,
    downlink_bps,
    path_loss_db,
    uplink_bps,
)

POSITIONS = np.random.default_rng(0).uniform(-200, 200, (12, 2))
STILL = ChannelSpec(fading=FadingSpec(kind="none"), shadowing_db=0.0)
STATIONS = np.array([[30.0, 40.0], [-150.0, 90.0], [200.0, -10.0]])
HOME = np.arange(12) % 3
homes = st.lists(st.integers(0, 2), min_size=12, max_size=12)
specs = st.builds(
    ChannelSpec,
    path_loss=st.sampled_from(["papers", "umi", "uma", "rma"]),
    fading=st.builds(
        FadingSpec,
        kind=st.sampled_from(["none", "rayleigh", "rician"]),
        per=st.sampled_from(["round", "step"]),
        speed_m_s=st.sampled_from([None, 0.0, 1.5]),
    ),
    mobility=st.builds(MobilitySpec, enabled=st.booleans(), side_m=st.just(400.0)),
)
moments = st.tuples(st.integers(0, 50), st.sampled_from([None, 0, 3]))


@settings(max_examples=40, deadline=None)
@given(spec=specs, asked=st.lists(moments, min_size=1, max_size=5), wanted=moments)
def test_a_realisation_does_not_depend_on_what_was_asked_before(spec, asked, wanted):
    used, fresh = (Channel(spec, POSITIONS, seed=3) for _ in range(2))
    for moment in asked:
        used.realise(*moment)
    assert np.array_equal(used.realise(*wanted).gain_up, fresh.realise(*wanted).gain_up)
    assert np.array_equal(used.realise(*wanted).gain_down, fresh.realise(*wanted).gain_down)


@settings(max_examples=30, deadline=None)
@given(spec=specs)
def test_steps_differ_only_when_fading_is_per_step(spec):
    channel = Channel(spec, POSITIONS, seed=3)
    same = np.array_equal(channel.realise(2, 0).gain_up, channel.realise(2, 5).gain_up)
    changes = spec.fading.kind != "none" and spec.fading.speed_m_s != 0
    moves = spec.mobility.enabled
    assert same == (spec.fading.per == "round" or not (changes or moves))


def test_a_round_has_one_state_or_one_per_step():
    assert len(Channel(ChannelSpec(), POSITIONS).realise_steps(2, 5)) == 1
    channel = Channel(ChannelSpec(fading=FadingSpec(per="step")), POSITIONS)
    states = channel.realise_steps(2, 5)
    assert len(states) == 5
    assert np.array_equal(states[3].gain_up, channel.realise(2, 3).gain_up)


def test_gain_without_randomness_is_the_path_loss():
    state = Channel(STILL, POSITIONS, [30.0, 40.0]).realise(0)
    distance = np.hypot(POSITIONS[:, 0] - 30, POSITIONS[:, 1] - 40)
    expected = path_loss_db("papers", distance, True, 2e9)
    assert -10 * np.log10(state.gain_up) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(spec=specs, moment=moments, first=homes, then=homes)
def test_links_to_other_stations_depend_on_seed_and_time_alone(spec, moment, first, then):
    """Whatever was asked before, and wherever the device belongs, own links stay as they are."""
    used, fresh = (Channel(spec, POSITIONS, STATIONS, 3, HOME) for _ in range(2))
    plain = Channel(spec, POSITIONS, STATIONS[HOME[0]], 3, np.zeros(12, int))
    state = used.realise(*moment)
    found, expected = state.over(first).over(then), fresh.realise(*moment).over(then)
    for way in ("gain_up", "gain_down"):
        assert np.array_equal(getattr(found, way), getattr(expected, way))
        own = np.asarray(then) == HOME
        assert np.array_equal(getattr(found, way)[own], getattr(state, way)[own])
        assert not np.isin(getattr(found, way)[~own], getattr(state, way)).any()
        near = HOME[0] == HOME
        alone = getattr(plain.realise(*moment), way)
        assert np.array_equal(getattr(state, way)[near], alone[near])


def test_other_stations_links_have_their_own_distance_and_fade_as_any():
    """Without randomness the path loss; with it, mean power 1 and no correlation with home."""
    still = Channel(STILL, POSITIONS, STATIONS, home=HOME)
    for state in (still.realise(0), still.mean(0)):
        gain_db = 10 * np.log10(state.over(np.full(12, 2)).gain_up)
        distance = np.hypot(*(POSITIONS - STATIONS[2]).T)
        assert -gain_db == pytest.approx(path_loss_db("papers", distance, True, 2e9))
    many = np.tile([10.0, 20.0], (20_000, 1))
    quiet = Channel(STILL, many, STATIONS, home=np.zeros(20_000, int)).mean(0)
    faded = Channel(replace(STILL, fading=FadingSpec()), many, STATIONS, 0, np.zeros(20_000, int))
    there = np.ones(20_000, int)
    home, away = (
        state.gain_up / mean.gain_up
        for state, mean in (
            (faded.realise(1), quiet),
            (faded.realise(1).over(there), quiet.over(there)),
        )
    )
    assert away.mean() == pytest.approx(1, abs=0.03)
    assert np.corrcoef(home, away)[0, 1] == pytest.approx(0, abs=0.03)


def test_a_station_beyond_the_models_range_is_not_heard():
    spec = replace(STILL, path_loss="umi")
    channel = Channel(spec, [[10.0, 0.0], [20.0, 0.0]], [[0.0, 0.0], [6e3, 0.0]], home=[0, 0])
    away = channel.realise(0).over([1, 0])
    assert away.gain_up[0] == 0
    assert away.gain_up[1] == channel.realise(0).gain_up[1]


def test_mean_loss_over_the_cell_is_the_formulas_integral():
    # Uniform in a disc of radius R: E[log10 d] = log10 R - log10(e) / 2.
    rng = np.random.default_rng(1)
    n, radius = 100_000, 500.0
    r, angle = radius * np.sqrt(rng.uniform(size=n)), rng.uniform(0, 2 * np.pi, n)
    positions = np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1)
    spec = replace(STILL, shadowing_db=8.0)
    loss = -10 * np.log10(Channel(spec, positions).realise(0).gain_up)
    expected = 128.1 + 37.6 * (np.log10(radius / 1e3) - 0.5 * np.log10(np.e))
    assert loss.mean() == pytest.approx(expected, abs=0.2)
    assert loss.std() == pytest.approx(np.hypot(8, 37.6 * 0.5 * np.log10(np.e)), rel=0.02)


def test_outage_of_the_link_is_rayleighs():
    positions = np.tile([100.0, 0.0], (100_000, 1))
    quiet = replace(STILL, fading=FadingSpec(kind="rayleigh"))
    state = Channel(quiet, positions, seed=5).realise(9)
    mean_snr = 10 ** ((23 - 30 - 90.5 + 174 + 30) / 10) / 20e6
    target_bps = 20e6 * np.log2(1 + mean_snr / 10)
    assert np.mean(uplink_bps(state, 20e6) < target_bps) == pytest.approx(
        -np.expm1(-1 / 10), abs=0.005
    )


@given(
    shares=st.lists(st.just(0.0) | st.floats(1e-6, 1), min_size=12, max_size=12),
    device=st.integers(0, 11),
)
def test_rates_follow_the_papers_formulas(shares, device):
    state = Channel(ChannelSpec(), POSITIONS).realise(1)
    share = 20e6 * np.array(shares)
    up, down = uplink_bps(state, share), downlink_bps(state, share)
    gain, width = state.gain_up[device], share[device]
    noise = 10**-17.4 * 1e-3
    power = 10**2.3 * 1e-3
    expected = width * np.log2(1 + power * gain / (noise * width)) if width > 0 else 0.0
    assert up[device] == pytest.approx(expected, rel=1e-9)
    density = 10**4.3 * 1e-3 / 20e6
    wanted = width * np.log2(1 + density * state.gain_down[device] / noise)
    assert down[device] == pytest.approx(wanted, rel=1e-9)
    assert uplink_bps(state, width, [device]) == pytest.approx(up[[device]])


def test_table_rates_never_exceed_shannons():
    plain = Channel(ChannelSpec(), POSITIONS).realise(0)
    for model in ("cqi_64qam", "cqi_256qam"):
        state = Channel(ChannelSpec(rate=model), POSITIONS).realise(0)
        assert np.all(uplink_bps(state, 1e6) <= uplink_bps(plain, 1e6))
        assert np.any(uplink_bps(state, 1e6) > 0)


def test_directions_fade_apart_but_share_the_path():
    loud = Channel(ChannelSpec(), POSITIONS).realise(0)
    assert not np.allclose(loud.gain_up, loud.gain_down)
    still = Channel(replace(ChannelSpec(), fading=FadingSpec(kind="none")), POSITIONS).realise(0)
    assert np.array_equal(still.gain_up, still.gain_down)


def test_only_links_in_sight_have_a_direct_path():
    def power(sight):
        spec = replace(STILL, line_of_sight=sight, fading=FadingSpec(kind="rician", k_db=20.0))
        gains = Channel(spec, np.tile([100.0, 0.0], (20_000, 1))).realise(0).gain_up
        return gains / gains.mean()

    # The variance of the normalised power is (2K + 1) / (K + 1)^2: 0.0197 for K = 100, 1 for K = 0.
    assert power("always").var() == pytest.approx(201 / 101**2, rel=0.1)
    assert power("never").var() == pytest.approx(1, rel=0.1)


def test_a_hundred_thousand_devices_take_well_under_a_second():
    positions = np.random.default_rng(2).uniform(-300, 300, (100_000, 2))
    spec = ChannelSpec(path_loss="umi", fading=FadingSpec(speed_m_s=1.0))
    channel = Channel(spec, positions)
    spent = []
    for round_ in range(3):
        begin = time.process_time()
        uplink_bps(channel.realise(round_), 1e3)
        spent.append(time.process_time() - begin)
    assert min(spent) < 0.8


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"path_loss": "sky"}, "channel.path_loss='sky': must be one of uma, umi"),
        ({"bandwidth_hz": -1.0}, "channel.bandwidth_hz=-1.0: must be finite and above 0"),
        ({"bandwidth_hz": float("nan")}, "channel.bandwidth_hz=nan"),
        ({"device_dbm": float("inf")}, "channel.device_dbm=inf: must be finite"),
        ({"shadowing_db": -1.0}, "channel.shadowing_db=-1.0: must be null or from 0 to 50"),
        ({"line_of_sight": "maybe"}, "must be one of random, always, never"),
        ({"path_loss": "rma", "carrier_hz": 60e9}, "channel.carrier_hz=.* in 5e.08..3e.10 for rma"),
        ({"path_loss": "uma", "device_m": 20.0}, "channel.device_m=20.0: must be in 1.5..13 for"),
        ({"rate": "fast"}, "channel.rate='fast'"),
        ({"path_loss": "trace"}, "channel.trace_file=None: must be a CSV file"),
        ({"path_loss": "trace", "trace_file": "x", "gap_db": 3.0}, "channel.rate"),
        ({"trace_file": "x"}, "channel.trace_file='x': must be null unless"),
    ],
)
def test_bad_settings_are_named(settings_, named):
    with pytest.raises(FedsplitError, match=named):
        ChannelSpec(**settings_)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: FadingSpec(kind="fog"), "channel.fading.kind='fog'"),
        (lambda: FadingSpec(speed_m_s=-1.0), "channel.fading.speed_m_s=-1.0"),
        (lambda: FadingSpec(k_db=float("nan")), "channel.fading.k_db=nan"),
        (lambda: MobilitySpec(side_m=0.0), "channel.mobility.side_m=0.0"),
        (lambda: MobilitySpec(max_speed_m_s=0.1), "max_speed_m_s=0.1: must be from min_speed"),
        (lambda: Channel(ChannelSpec(path_loss="umi"), [[9e3, 0]]), "distance_m=9000.0"),
        (lambda: Channel(ChannelSpec(), [1.0, 2.0]), "positions_m=.*of shape"),
        (lambda: Channel(ChannelSpec(), POSITIONS).realise(-1), "round=-1"),
        (lambda: Channel(ChannelSpec(), POSITIONS, STATIONS), "home=None.*3 stations"),
        (lambda: Channel(ChannelSpec(), POSITIONS, STATIONS, home=[0, 1]), r"home=\(2,\)"),
        (lambda: Channel(ChannelSpec(), POSITIONS, STATIONS, home=[3] * 12), "stations 0 to 2"),
        (lambda: Channel(ChannelSpec(), POSITIONS).realise(1).over([7] * 12), "station=7"),
    ],
)
def test_bad_parts_are_named(build, named):
    with pytest.raises(FedsplitError, match=named):
        build()


@settings(max_examples=15, deadline=None)
@given(
    path_loss=st.sampled_from(["papers", "umi"]),
    kind=st.sampled_from(["none", "rayleigh", "rician"]),
    walking=st.booleans(),
)
def test_the_mean_channel_is_what_fading_averages_to(path_loss, kind, walking):
    mobility = MobilitySpec(enabled=walking, side_m=400.0)
    spec = ChannelSpec(path_loss=path_loss, mobility=mobility, fading=FadingSpec(kind=kind))
    channel = Channel(spec, POSITIONS, seed=3)
    still = Channel(replace(spec, fading=FadingSpec(kind="none")), POSITIONS, seed=3)
    for round_ in (0, 7):
        assert np.array_equal(channel.mean(round_).gain_up, still.realise(round_).gain_up)
    if not walking:
        states = [channel.realise(round_) for round_ in range(800)]
        for way in ("gain_up", "gain_down"):
            average = np.mean([getattr(state, way) for state in states], axis=0)
            ratio = average / getattr(channel.mean(5), way)
            # A Rayleigh power has a standard deviation of 1.
            assert np.abs(ratio - 1).max() < 5 / np.sqrt(800)


def test_the_mean_of_a_trace_is_its_mean_rate(tmp_path):
    file = tmp_path / "rates.csv"
    file.write_text("round,device,uplink_bps,downlink_bps\n0,0,1e6,4e6\n1,0,3e6,8e6\n")
    spec = ChannelSpec(path_loss="trace", trace_file=str(file))
    channel = Channel(spec, POSITIONS[:1])
    state = channel.mean(0)
    assert uplink_bps(state, state.uplink_hz)[0] == pytest.approx(2e6)
    assert downlink_bps(state, state.downlink_hz)[0] == pytest.approx(6e6)
