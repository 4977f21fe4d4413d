"""Peak memory of every device and server in a round."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.fleet.cost import training_memory_bytes
from fedsplit.fleet.fleet import Fleet
from fedsplit.fleet.stages import Group
from fedsplit.fleet.turns import Turns
from fedsplit.plan import DEVICE, EDGE
from fedsplit.profiles import ModelProfile

IntArray = NDArray[np.int64]


def device_memory_bytes(
    groups: Sequence[Group], turns: Turns, batch_size: int, n_devices: int
) -> Array:
    """Return the peak of each device over its turns, 0 if it takes no part; shape ``[N]``."""
    peak = np.zeros(n_devices)
    for group in groups:
        own = np.array([tier == DEVICE for tier in group.tiers])
        names = ("parameter_bytes", "activation_bytes", "optimizer_bytes", "adapter_bytes")
        costs = group.costs
        held = {name: costs.together(name, group.starts, group.stops, own) for name in names}
        held["parameter_bytes"] -= (1 - group.share) * held["adapter_bytes"]
        held["adapter_bytes"] *= group.share
        held["optimizer_bytes"] *= group.share
        held["activation_bytes"] = held["activation_bytes"] * group.pace.at_once
        for name in ("activation_bytes", "optimizer_bytes", "adapter_bytes"):
            held[name] *= ~group.frozen  # weights like others, and nothing waits for a gradient
        workspace = costs.largest("workspace_bytes", group.starts, group.stops)[:, own].max(axis=1)
        needed = training_memory_bytes(**held, workspace_bytes=workspace, batch_size=batch_size)
        np.maximum.at(peak, turns.device[group.members], needed)
    return peak


def server_memory_bytes(
    groups: Sequence[Group],
    turns: Turns,
    *,
    profile: ModelProfile,
    batch_size: int,
    fleet: Fleet,
) -> Array:
    """Return the peak of each server, shape ``[servers]``.

    Turns share the frozen weights of all blocks that any of them puts on the server, unless
    `ServingSpec.private_backbones`; each live turn holds its adapters and optimizer state, and at
    an edge that averages its device's trained adapters too. It holds its activations and workspace
    as well, but a first-come-first-served server needs one
    workspace at a time, and activations of one mini-batch at a time on the last segment, where
    forward and backward are one visit; elsewhere it keeps those of `ServingSpec.waiting_steps` at
    most. Residuals are those of all turns, but each branch has its own once it has averaged.
    """
    n_slots, n_servers = int(turns.slot.max()) + 1, len(fleet.servers)
    one_at_a_time = fleet.serving.discipline == "fifo"
    # What turns that follow each other hold on each server: the largest of them.
    names = ("frozen", "trained", "activations")
    held = {name: np.zeros((n_slots, n_servers)) for name in names}
    single = np.zeros(n_servers)
    residuals = np.zeros((int(turns.branch.max()) + 1, n_servers))
    hosted: set[tuple[int, int, int, bool]] = set()
    for group in groups:
        slot, last = turns.slot[group.members], len(group.tiers) - 1
        costs = group.costs
        weights, adapters, activations, optimizer = (
            costs.segments(name, group.starts, group.stops)
            for name in ("parameter_bytes", "adapter_bytes", "activation_bytes", "optimizer_bytes")
        )
        workspace = costs.largest("workspace_bytes", group.starts, group.stops)
        given = costs.segments("residual_bytes", group.starts, group.stops)
        own = np.array([tier == DEVICE for tier in group.tiers])
        for column, tier in enumerate(group.tiers):
            if tier == DEVICE:
                continue
            edge = turns.edge[group.members]
            node = 1 + edge if tier == EDGE else np.zeros_like(edge)
            beside = given[:, column]
            trained = 2 * group.adapter_bytes[:, column] + optimizer[:, column] * group.share
            if group.at_edge and tier == EDGE:
                near = costs.together("adapter_bytes", group.starts, group.stops, own)
                trained += near * group.share
                beside = beside + given[:, own].sum(axis=1)
            live = batch_size * activations[:, column]
            busy = batch_size * workspace[:, column]
            frozen = weights[:, column] - adapters[:, column]
            np.maximum.at(held["frozen"], (slot, node), frozen)
            np.maximum.at(residuals, (turns.branch[group.members], node), beside)
            np.maximum.at(held["trained"], (slot, node), trained)
            if not one_at_a_time:
                np.maximum.at(held["activations"], (slot, node), live + busy)
            elif column == last:
                np.maximum.at(single, node, live + busy)
            else:
                np.maximum.at(held["activations"], (slot, node), live)
                np.maximum.at(single, node, busy)
            rows = np.stack([node, group.starts[:, column], group.stops[:, column]], axis=1)
            hosted |= {(*row, column == last) for row in map(tuple, rows.tolist())}
    if one_at_a_time:
        places = min(fleet.serving.waiting_steps, n_slots)
        held["activations"] = np.sort(held["activations"], axis=0)[n_slots - places :]
    apart = len({id(group.costs) for group in groups}) > 1
    own = residuals.sum(axis=0) if apart else residuals.max(axis=0)
    shared = _shared_weights(hosted, profile, n_servers) + own
    frozen_bytes = held["frozen"].sum(axis=0) if fleet.serving.private_backbones else shared
    total: Array = (
        frozen_bytes + held["trained"].sum(axis=0) + held["activations"].sum(axis=0) + single
    )
    return total


def _shared_weights(
    hosted: set[tuple[int, int, int, bool]], profile: ModelProfile, n_servers: int
) -> Array:
    """Return the frozen weights of all units on each server, each counted once."""
    units = (*profile.blocks, profile.head)
    sizes = np.array([unit.parameter_bytes - unit.adapter_bytes for unit in units])
    wanted = np.zeros((n_servers, len(sizes)), dtype=bool)
    for node, start, stop, is_last in hosted:
        wanted[node, start:stop] = True
        wanted[node, -1] |= is_last
    result: Array = wanted @ sizes
    for group in profile.shared:
        # No server holds the embeddings.
        users = [unit - 1 for unit in group.units if unit > 0]
        again = np.maximum(wanted[:, users].sum(axis=1) - 1, 0)
        result -= again * (group.parameter_bytes - group.adapter_bytes)
    return result
