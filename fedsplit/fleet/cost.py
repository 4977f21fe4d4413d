"""What one activity costs: closed forms over arrays.

Papers' section 7.3, 4 and 5: delay = FLOPs / (f delta sigma), energy = xi f^3 t and p t, memory by
formula. All arguments broadcast.
"""

import numpy as np
from numpy.typing import ArrayLike

from fedsplit.arrays import Array


def compute_delay_s(flops: ArrayLike, clock_hz: ArrayLike, flops_per_cycle: ArrayLike) -> Array:
    """Return the seconds that `flops` take: ``F / (f delta sigma)`` (papers' section 5 (b))."""
    return _array(flops) / (_array(clock_hz) * _array(flops_per_cycle))


def compute_energy_j(
    flops: ArrayLike,
    clock_hz: ArrayLike,
    flops_per_cycle: ArrayLike,
    energy_coefficient: ArrayLike,
) -> Array:
    """Return the joules that `flops` take under DVFS.

    Power ``xi f^3`` for ``F / (f delta sigma)`` seconds is ``xi f^2 F / (delta sigma)`` (CARD's
    server energy, papers' section 5 (b)).
    """
    cycles = _array(flops) / _array(flops_per_cycle)
    return _array(energy_coefficient) * _array(clock_hz) ** 2 * cycles


def transmit_energy_j(power_w: ArrayLike, seconds: ArrayLike) -> Array:
    """Return the joules of sending for `seconds` at `power_w`."""
    return _array(power_w) * _array(seconds)


def training_memory_bytes(
    *,
    parameter_bytes: ArrayLike,
    activation_bytes: ArrayLike,
    adapter_bytes: ArrayLike,
    optimizer_bytes: ArrayLike,
    workspace_bytes: ArrayLike,
    batch_size: ArrayLike,
) -> Array:
    """Return the peak bytes of a node that trains one segment for one branch.

    ``W + A b + R (1 weight + 1 gradient) + o + w b`` with W the frozen weights, all but the
    adapters (papers' section 1 (b), and the workspace w of the unit that computes).

    Parameters
    ----------
    parameter_bytes, adapter_bytes, optimizer_bytes : array_like
        All weights of the segment, the trained ones among them, and their optimizer state.
    activation_bytes, workspace_bytes : array_like
        Kept for backward, and needed on top while computing, per sample.
    batch_size : array_like
        Samples per mini-batch.
    """
    frozen = _array(parameter_bytes) - _array(adapter_bytes)
    activations = _array(activation_bytes) * _array(batch_size)
    trained = 2 * _array(adapter_bytes) + _array(optimizer_bytes)
    return frozen + activations + trained + _array(workspace_bytes) * _array(batch_size)


def _array(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)
