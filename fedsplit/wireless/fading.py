"""Random parts of a radio link that can be evaluated at any time or place without a history.

Both correlated processes here are random Fourier sums: a few waves with random frequencies and
Gaussian amplitudes. Whatever the frequencies, one value of such a sum is exactly Gaussian; and with
frequencies drawn from the right spectrum its autocorrelation over realisations is exactly the
wanted one. Round 500 therefore needs no rounds 0..499 before it, unlike an autoregressive filter.
"""

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array

ComplexArray = NDArray[np.complex128]

N_WAVES = 16


def complex_normal(rng: np.random.Generator, *shape: int) -> ComplexArray:
    """Return independent circular Gaussian draws of unit power."""
    parts = rng.standard_normal((*shape, 2)) * np.sqrt(0.5)
    result: ComplexArray = parts[..., 0] + 1j * parts[..., 1]
    return result


class ScatteredField:
    """Diffuse multipath of `n_devices` links with Jakes' Doppler spectrum.

    One value is circular Gaussian with unit power (Rayleigh amplitude); values `lag` seconds apart
    have correlation ``J0(2 pi doppler_hz lag)`` (Clarke 1968; Jakes 1974, eq. 1.3-7), because each
    wave arrives from a uniform direction.

    Parameters
    ----------
    n_devices : int
        Number of independent links.
    doppler_hz : float
        Maximum Doppler shift, speed x carrier / c.
    rng : Generator
        Source of all draws.
    """

    def __init__(self, n_devices: int, doppler_hz: float, rng: np.random.Generator) -> None:
        directions = rng.uniform(0, 2 * np.pi, (n_devices, N_WAVES))
        self._shift_hz = doppler_hz * np.cos(directions)
        self._amplitude = complex_normal(rng, n_devices, N_WAVES) / np.sqrt(N_WAVES)

    def at(self, time_s: float) -> ComplexArray:
        """Return the complex gain of every link at `time_s`, shape ``[n_devices]``."""
        phases = np.exp(2j * np.pi * time_s * self._shift_hz)
        result: ComplexArray = np.einsum("nm,nm->n", self._amplitude, phases)
        return result


class ShadowField:
    """Standard normal shadowing of `n_devices` links that decorrelates with the distance moved.

    One value is standard normal; values at places `d` metres apart have correlation
    ``exp(-d / correlation_m)`` (Gudmundson 1991; TR 38.901 7.4.4), because wave numbers are drawn
    from the two-dimensional spectrum of that function, density ~ (1 + k^2)^(-3/2).

    Parameters
    ----------
    n_devices : int
        Number of independent links.
    rng : Generator
        Source of all draws.
    """

    def __init__(self, n_devices: int, rng: np.random.Generator) -> None:
        # The distribution of the radial wave number is 1 - 1/sqrt(1 + k^2), inverted here.
        radius = np.sqrt((1 - rng.uniform(size=(n_devices, N_WAVES, 1))) ** -2.0 - 1)
        angle = rng.uniform(0, 2 * np.pi, (n_devices, N_WAVES, 1))
        self._wave = radius * np.concatenate([np.cos(angle), np.sin(angle)], axis=2)
        self._amplitude = rng.standard_normal((2, n_devices, N_WAVES)) / np.sqrt(N_WAVES)

    def at(self, positions_m: Array, correlation_m: Array) -> Array:
        """Return the shadowing in standard deviations, shape ``[n_devices]``.

        Parameters
        ----------
        positions_m : ndarray
            Where each device is, shape ``[n_devices, 2]``.
        correlation_m : ndarray
            Decorrelation distance of each link, shape ``[n_devices]``.
        """
        scaled = positions_m / correlation_m[:, None]
        phase = np.einsum("nmk,nk->nm", self._wave, scaled)
        result: Array = np.sum(
            self._amplitude[0] * np.cos(phase) + self._amplitude[1] * np.sin(phase), axis=1
        )
        return result


def rician(
    scattered: ComplexArray, line_of_sight_phase: Array, k_factor: Array | float
) -> ComplexArray:
    """Add a direct path to diffuse multipath and return gains of unit mean power.

    Parameters
    ----------
    scattered : ndarray of complex
        Diffuse part of unit power, shape ``[N]``.
    line_of_sight_phase : ndarray
        Phase of the direct path in radians, shape ``[N]``.
    k_factor : float or ndarray
        Power of the direct path over that of the diffuse part (linear; 0 is Rayleigh).
    """
    direct = np.sqrt(k_factor / (k_factor + 1)) * np.exp(1j * line_of_sight_phase)
    result: ComplexArray = direct + np.sqrt(1 / (k_factor + 1)) * scattered
    return result
