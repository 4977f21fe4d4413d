"""A fleet whose machines said how fast they really are."""

from collections.abc import Mapping
from dataclasses import replace

from fedsplit.fleet.fleet import Fleet, Nodes
from fedsplit.measured import MeasuredProfile
from fedsplit.plan import DEVICE, EDGE
from fedsplit.profiles import ModelProfile

SPEEDS = (1e6, 1e18)
"""FLOP/s that a machine may have: what is outside is broken or meant to break."""


def measured_fleet(
    fleet: Fleet, profile: ModelProfile, machines: Mapping[tuple[str, int], MeasuredProfile]
) -> Fleet:
    """Return `fleet` with machines as fast as they said, for all planners and the timeline.

    A machine's FLOPs per cycle become those that make the whole model take the time measured; its
    memory and, where its board told, its power at full clock are taken too. What does not fit the
    model, or no machine can be, changes nothing.

    Parameters
    ----------
    fleet : Fleet
        As modelled.
    profile : ModelProfile
        The model that it trains.
    machines : mapping of tuple to MeasuredProfile
        By role (`DEVICE`, `EDGE`, `SERVER`) and index; the server's is 0.
    """
    devices = {index: found for (role, index), found in machines.items() if role == DEVICE}
    servers = {
        index + (role == EDGE): found for (role, index), found in machines.items() if role != DEVICE
    }
    return replace(
        fleet,
        devices=_measured(fleet.devices, profile, devices),
        servers=_measured(fleet.servers, profile, servers),
    )


def _measured(
    nodes: Nodes, profile: ModelProfile, machines: Mapping[int, MeasuredProfile]
) -> Nodes:
    per_cycle, memory = nodes.flops_per_cycle.copy(), nodes.memory_bytes.copy()
    coefficient = nodes.energy_coefficient.copy()
    for node, found in machines.items():
        speed = found.flops_per_s(profile) if found.fits(profile) else 0.0
        # An edge of more than the fleet has serves nobody.
        if node >= len(nodes) or not SPEEDS[0] <= speed <= SPEEDS[1]:
            continue
        clock_hz = nodes.clock_hz[node]
        per_cycle[node] = speed / clock_hz
        if found.memory_bytes is not None:
            memory[node] = found.memory_bytes
        if found.power_w is not None:
            coefficient[node] = found.power_w / clock_hz**3
    return replace(
        nodes, flops_per_cycle=per_cycle, memory_bytes=memory, energy_coefficient=coefficient
    )
