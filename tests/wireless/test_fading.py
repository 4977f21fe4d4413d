"""Fading and shadowing against the distributions and correlations they are named after."""

import numpy as np
import pytest
from scipy.special import j0
from scipy.stats import kstest, ncx2

from fedsplit.seeds import generator
from fedsplit.wireless.fading import (
    ScatteredField,
    ShadowField,
    complex_normal,
    rician,
)

N = 20_000


def test_outage_of_independent_blocks_is_rayleighs():
    power = np.abs(complex_normal(generator(0, "blocks"), 200_000)) ** 2
    for floor in (0.01, 0.1, 1.0, 3.0):
        expected = -np.expm1(-floor)  # The power of a circular Gaussian is exponential.
        spread = np.sqrt(expected * (1 - expected) / len(power))
        assert np.mean(power < floor) == pytest.approx(expected, abs=5 * spread)


@pytest.mark.parametrize("time_s", [0.0, 0.37, 1234.5])
def test_correlated_fading_is_exactly_rayleigh_at_any_time(time_s):
    gains = ScatteredField(N, 10.0, generator(1, "field")).at(time_s)
    assert kstest(np.abs(gains) ** 2, "expon").pvalue > 1e-3
    assert abs(np.mean(gains)) < 5 / np.sqrt(N)


@pytest.mark.parametrize("lag_s", [0.0, 0.01, 0.0383, 0.06, 0.2])
def test_correlation_in_time_is_jakes(lag_s):
    doppler_hz = 10.0
    field = ScatteredField(N, doppler_hz, generator(2, "field"))
    measured = np.mean(field.at(5.0 + lag_s) * np.conj(field.at(5.0)))
    assert measured == pytest.approx(j0(2 * np.pi * doppler_hz * lag_s), abs=5 / np.sqrt(N))


def test_standing_devices_do_not_fade():
    field = ScatteredField(10, 0.0, generator(3, "field"))
    assert np.allclose(field.at(0.0), field.at(1e4))


@pytest.mark.parametrize("k_factor", [0.0, 1.0, 8.0])
def test_rician_power_is_noncentral_chi_square_of_mean_one(k_factor):
    rng = generator(4, "rician")
    gains = rician(complex_normal(rng, N), rng.uniform(0, 6.28, N), k_factor)
    power = np.abs(gains) ** 2
    law = ncx2(2, 2 * k_factor + 1e-12, scale=0.5 / (k_factor + 1))
    assert kstest(power, law.cdf).pvalue > 1e-3
    assert np.mean(power) == pytest.approx(1, abs=5 / np.sqrt(N))


@pytest.mark.parametrize("moved_m", [0.0, 5.0, 13.0, 60.0])
def test_shadowing_decorrelates_exponentially_with_distance(moved_m):
    field = ShadowField(N, generator(5, "shadow"))
    start, correlation = np.full((N, 2), 100.0), np.full(N, 13.0)
    before, after = (
        field.at(start + np.array([offset, 0.0]), correlation) for offset in (0.0, moved_m)
    )
    assert kstest(after, "norm").pvalue > 1e-3
    assert np.mean(before * after) == pytest.approx(np.exp(-moved_m / 13), abs=6 / np.sqrt(N))
