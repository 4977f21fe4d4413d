"""What a cut of a layer graph costs: delay, energy and device memory of one device's turn.

The delay of a device part S that holds its own parents (Fast AI model splitting, arXiv
2507.01041; formula re-derived) is::

    T(S) = steps * [ sum_{v in S} device_v + sum_{v not in S} server_v
                     + sum_{v in S with a child not in S} (a_v / R_up + g_v / R_down) ]
           + sum_{v in S} k_v (1 / R_up + 1 / R_down)

with the compute times of a mini-batch, the bits a_v of a vertex's output, g_v of its gradient (none
where nothing below is trained) and k_v of its trained parameters.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.errors import require
from fedsplit.layergraph import LayerGraph

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class CutSystem:
    """The device, server and radio link that a cut is for.

    Parameters
    ----------
    device_flops_per_s, server_flops_per_s : float
    uplink_bps, downlink_bps : float
        Rates in bit/s.
    steps, batch : int
        Mini-batches of a turn, samples of a mini-batch.
    uplink_ratio, downlink_ratio : float or array, shape [n]
        Transmitted over raw bits of the codec; one number, or one for every vertex's output.
    device_watt, transmit_watt : float
        Power of the device while it computes and while it sends.
    energy_weight : float
        Seconds that a joule of the device is worth in the objective; 0 minimises delay alone.
    optimizer_copies : float
        Optimizer state per trained parameter (AdamW keeps two), for the device's memory.

    Raises
    ------
    FedsplitError
        If a rate is not positive, another value negative, or any is not finite.
    """

    device_flops_per_s: float
    server_flops_per_s: float
    uplink_bps: float
    downlink_bps: float
    steps: int = 1
    batch: int = 1
    uplink_ratio: float | Array = 1.0
    downlink_ratio: float | Array = 1.0
    device_watt: float = 0.0
    transmit_watt: float = 0.0
    energy_weight: float = 0.0
    optimizer_copies: float = 2.0

    def __post_init__(self) -> None:
        for name in (
            "device_flops_per_s",
            "server_flops_per_s",
            "uplink_bps",
            "downlink_bps",
            "steps",
            "batch",
        ):
            value = getattr(self, name)
            require(0 < value < np.inf, name, value, "positive and finite")
        for name in ("uplink_ratio", "downlink_ratio"):
            values = np.asarray(getattr(self, name), dtype=np.float64)
            good = bool(((values > 0) & (values < np.inf)).all())
            require(good, name, getattr(self, name), "positive and finite")
        for name in ("device_watt", "transmit_watt", "energy_weight", "optimizer_copies"):
            value = getattr(self, name)
            require(0 <= value < np.inf, name, value, "finite and not negative")


@dataclass(frozen=True, eq=False)
class CutLimits:
    """What a cut must respect.

    Parameters
    ----------
    device_memory_bytes : float
        Memory of the device for parameters, gradients, optimizer state and activations.
    min_blocks : int
        Privacy floor: at least this many blocks (and the embeddings) stay on the device.
    on_device : tuple of int
        Vertices that stay on the device.

    Raises
    ------
    FedsplitError
        If a value is negative or not a number.
    """

    device_memory_bytes: float = np.inf
    min_blocks: int = 0
    on_device: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        memory = self.device_memory_bytes
        require(memory >= 0, "device_memory_bytes", memory, "at least 0")
        require(self.min_blocks >= 0, "min_blocks", self.min_blocks, "at least 0")
        require(all(v >= 0 for v in self.on_device), "on_device", self.on_device, "vertex indices")


@dataclass(frozen=True, kw_only=True)
class CutCost:
    """The terms of a cut's cost for a turn; `delay_s` is their sum in time."""

    device_s: float
    server_s: float
    uplink_s: float
    downlink_s: float
    adapter_s: float
    device_energy_j: float
    device_memory_bytes: float

    @property
    def delay_s(self) -> float:
        """Delay of the turn, T(S)."""
        return self.device_s + self.server_s + self.uplink_s + self.downlink_s + self.adapter_s


@dataclass(frozen=True, eq=False)
class CutWeights:
    """Cost of each vertex in the objective (s): on the device, on the server, if sent."""

    device: Array
    server: Array
    transfer: Array


def cut_weights(graph: LayerGraph, system: CutSystem) -> CutWeights:
    """Return the objective of `graph` on `system`, vertex by vertex."""
    flops = (graph.forward_flops + graph.backward_flops) * (system.batch * system.steps)
    bits = 8.0 * system.batch * system.steps
    compute = 1 + system.energy_weight * system.device_watt
    send = (1 + system.energy_weight * system.transmit_watt) / system.uplink_bps
    adapter_bits = 8.0 * graph.adapter_bytes
    return CutWeights(
        device=flops * (compute / system.device_flops_per_s)
        + adapter_bits * (send + 1 / system.downlink_bps),
        server=flops / system.server_flops_per_s,
        transfer=graph.output_bytes * (bits * send) * system.uplink_ratio
        + graph.gradient_bytes * (bits / system.downlink_bps) * system.downlink_ratio,
    )


def memory_weights(graph: LayerGraph, system: CutSystem) -> Array:
    """Return the device memory of each vertex in bytes: weights, training state, activations."""
    trained = (1 + system.optimizer_copies) * graph.adapter_bytes
    return graph.parameter_bytes + trained + system.batch * graph.activation_bytes


def cut_cost(graph: LayerGraph, system: CutSystem, device: Mask) -> CutCost:
    """Return what the cut with the vertices `device` (bool [n]) on the device costs.

    Raises
    ------
    FedsplitError
        If the cut is not a possible one.
    """
    graph.check_device(device)
    flops = (graph.forward_flops + graph.backward_flops) * (system.batch * system.steps)
    bits = 8.0 * system.batch * system.steps
    sent = graph.crossing(device)
    device_s = float(flops[device].sum()) / system.device_flops_per_s
    up_bits = bits * float((graph.output_bytes * system.uplink_ratio)[sent].sum())
    down_bits = bits * float((graph.gradient_bytes * system.downlink_ratio)[sent].sum())
    adapter_bits = 8.0 * float(graph.adapter_bytes[device].sum())
    sending_s = (up_bits + adapter_bits) / system.uplink_bps
    return CutCost(
        device_s=device_s,
        server_s=float(flops[~device].sum()) / system.server_flops_per_s,
        uplink_s=up_bits / system.uplink_bps,
        downlink_s=down_bits / system.downlink_bps,
        adapter_s=adapter_bits * (1 / system.uplink_bps + 1 / system.downlink_bps),
        device_energy_j=system.device_watt * device_s + system.transmit_watt * sending_s,
        device_memory_bytes=float(memory_weights(graph, system)[device].sum()),
    )
