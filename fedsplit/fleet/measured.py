"""A fleet whose machines said how fast they really are."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedsplit.fleet.fleet import Fleet
from fedsplit.measured import MeasuredProfile
from fedsplit.profiles import ModelProfile

SPEEDS = (1e6, 1e18)
"""FLOP/s that a machine may have: what is outside is broken or meant to break."""


def measured_fleet(
    fleet: Fleet, profile: ModelProfile, machines: Mapping[int, MeasuredProfile]
) -> Fleet:
    """Return `fleet` with devices as fast as they said, for all planners and the timeline.

    A device's FLOPs per cycle become those that make the whole model take the time measured; its
    memory and, where its board told, its power at full clock are taken too. What does not fit the
    model, or no machine can be, changes nothing.

    Parameters
    ----------
    fleet : Fleet
        As modelled.
    profile : ModelProfile
        The model that it trains.
    machines : mapping of int to MeasuredProfile
        By index of the device.
    """
    devices = fleet.devices
    per_cycle, memory = devices.flops_per_cycle.copy(), devices.memory_bytes.copy()
    coefficient = devices.energy_coefficient.copy()
    for device, found in machines.items():
        if not found.fits(profile):
            continue
        speed = found.flops_per_s(profile)
        if not SPEEDS[0] <= speed <= SPEEDS[1]:
            continue
        clock_hz = devices.clock_hz[device]
        per_cycle[device] = speed / clock_hz
        if found.memory_bytes is not None:
            memory[device] = found.memory_bytes
        if found.power_w is not None:
            coefficient[device] = found.power_w / clock_hz**3
    unchanged = np.array_equal(per_cycle, devices.flops_per_cycle)
    if unchanged and np.array_equal(memory, devices.memory_bytes):
        return fleet
    changed = replace(
        devices, flops_per_cycle=per_cycle, memory_bytes=memory, energy_coefficient=coefficient
    )
    return replace(fleet, devices=changed)
