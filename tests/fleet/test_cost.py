"""Cost functions: units, and the trade-offs that they are used for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsplit.fleet import compute_delay_s, compute_energy_j, transmit_energy_j

positive = st.floats(1e-3, 1e3)


def test_a_gigaflop_on_a_known_machine():
    # 2048 FLOPs per cycle at 625 MHz: 1.28 TFLOP/s; 15 W at that clock.
    xi = 15 / 0.625e9**3
    assert compute_delay_s(1.28e12, 0.625e9, 2048) == pytest.approx(1)
    assert compute_energy_j(1.28e12, 0.625e9, 2048, xi) == pytest.approx(15)
    assert transmit_energy_j(0.2, 3.0) == pytest.approx(0.6)


@given(flops=positive, clock=positive, cycle=positive, xi=positive)
def test_energy_is_cubic_power_times_delay(flops, clock, cycle, xi):
    delay = compute_delay_s(flops, clock, cycle)
    assert compute_energy_j(flops, clock, cycle, xi) == pytest.approx(xi * clock**3 * delay)


@given(factor=st.floats(0.1, 1))
def test_a_slower_clock_saves_energy_by_its_square(factor):
    delays = compute_delay_s(1.0, np.array([1.0, factor]), 1.0)
    energies = compute_energy_j(1.0, np.array([1.0, factor]), 1.0, 1.0)
    assert delays[1] == pytest.approx(delays[0] / factor)
    assert energies[1] == pytest.approx(energies[0] * factor**2)
