"""Cuts that need no search: prefixes of a graph, and blocks that a bound rules out.

A vertex that every path passes splits a graph in two, so that every cut lies wholly before or
wholly behind it. Between two such vertices lies a block. The block-wise algorithm contracts a block
to one vertex unless a cut inside it could be the best; here that test is a proven lower bound on
all cuts inside, so the answer is that of the whole graph.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.layergraph import LayerGraph
from fedsplit.planning.cut_cost import CutSystem, CutWeights
from fedsplit.planning.cut_network import EXACT_BELOW, CutNetwork

Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]


class Prefixes:
    """The cuts that keep the first vertices, in topological order, on the device.

    `sizes` are the lengths of the possible ones, ascending; the whole graph is the last.
    """

    def __init__(self, graph: LayerGraph) -> None:
        blocked = np.zeros(graph.n + 2, dtype=np.int64)
        vertex, needed = graph.requires[:, 0], graph.requires[:, 1]
        later = needed > vertex
        np.add.at(blocked, vertex[later] + 1, 1)
        np.add.at(blocked, needed[later] + 1, -1)
        sizes = np.flatnonzero(np.cumsum(blocked)[: graph.n + 1] == 0)
        self.sizes: Ints = sizes[sizes >= graph.n_inputs]
        self._last_child = np.arange(graph.n)
        np.maximum.at(self._last_child, graph.edges[:, 0], graph.edges[:, 1])
        flops = graph.forward_flops + graph.backward_flops
        self._flops = _sums(flops)[self.sizes]
        self._all_flops = float(flops.sum())
        self._adapter = _sums(graph.adapter_bytes)[self.sizes]
        self._output_bytes, self._gradient_bytes = graph.output_bytes, graph.gradient_bytes
        self._up = self._crossing(graph.output_bytes)
        self._down = self._crossing(graph.gradient_bytes)

    def costs(self, system: CutSystem) -> Array:
        """Return the objective of every prefix on `system` in s, shape [sizes]."""
        samples = system.batch * system.steps
        compute = (1 + system.energy_weight * system.device_watt) / system.device_flops_per_s
        up = 8 * (1 + system.energy_weight * system.transmit_watt) / system.uplink_bps
        down = 8 / system.downlink_bps
        server = samples / system.server_flops_per_s
        costs = self._flops * (samples * compute - server)
        costs += self._all_flops * server
        costs += self._adapter * (up + down)
        costs += _scaled(self._up, self._output_bytes, system.uplink_ratio, samples * up, self)
        costs += _scaled(
            self._down, self._gradient_bytes, system.downlink_ratio, samples * down, self
        )
        return costs

    def weighted(self, weights: CutWeights) -> Array:
        """Return the objective of every prefix under `weights`, shape [sizes]."""
        gain = _sums(weights.device - weights.server)[self.sizes]
        return gain + float(weights.server.sum()) + self._crossing(weights.transfer)

    def _crossing(self, values: Array) -> Array:
        """Return the sum of `values` over the vertices that each prefix sends."""
        change = np.zeros(len(values) + 2)
        change[1:-1] += values
        np.subtract.at(change, self._last_child + 1, values)
        # Sums of what comes and goes leave rounding dust where nothing crosses.
        sums: Array = np.maximum(np.cumsum(change)[self.sizes], 0.0)
        return sums


def _scaled(
    crossing: Array, values: Array, ratio: float | Array, factor: float, prefixes: Prefixes
) -> Array:
    if isinstance(ratio, np.ndarray) and ratio.ndim:
        return prefixes._crossing(values * ratio) * factor
    return crossing * (float(ratio) * factor)


def _sums(values: Array) -> Array:
    """Return the sums of the first 0, 1, ... n values."""
    return np.concatenate([[0.0], np.cumsum(values)])


@dataclass(frozen=True, eq=False)
class Block:
    """What lies between two vertices that every path passes.

    Parameters
    ----------
    start, stop : int
        The vertices ``[start, stop)`` are inside; all before `start` are on the device in a cut
        of this block, `stop` and all later ones on the server.
    vertices : int array, shape [k]
        Those of its network: what feeds it from outside, the inside, and `stop`.
    n_feeding : int
        How many of `vertices` feed it from outside.
    always : int array
        Inputs that any cut inside sends, because something behind the block reads them.
    up_bytes, down_bytes : float
        Lower bounds on the outputs and gradients that cross a cut inside.
    """

    start: int
    stop: int
    vertices: Ints
    n_feeding: int
    always: Ints
    network: CutNetwork
    up_bytes: float = 0.0
    down_bytes: float = 0.0

    def cut(self, weights: CutWeights, forced: Mask) -> Mask:
        """Return the best device part (bool, shape [n]) whose cut lies in this block."""
        local = CutWeights(
            weights.device[self.vertices],
            weights.server[self.vertices],
            weights.transfer[self.vertices],
        )
        chosen = self._solve(local, forced[self.vertices])
        device = np.arange(len(forced)) < self.start
        device[self.vertices[chosen]] = True
        return device

    def least(self, values: Array) -> float:
        """Return the least sum of `values` (shape [n]) that crosses a cut inside the block."""
        sent = values[self.vertices]
        nothing = np.zeros_like(sent)
        inside = self._solve(CutWeights(nothing, nothing, sent), np.zeros(len(sent), dtype=bool))
        found = self.network.crossing_sum(sent, inside)
        empty = self.network.crossing_sum(sent, np.arange(len(sent)) < self.n_feeding)
        safe = found if empty < EXACT_BELOW else found * (1 - 1e-6)
        return safe + float(values[self.always].sum())

    def _solve(self, weights: CutWeights, forced: Mask) -> Mask:
        count = len(self.vertices)
        feeding = np.arange(count) < self.n_feeding
        on_server = self.vertices >= self.stop
        on_device = (feeding | forced) & ~on_server
        # Everything inside on the one side or on the other is a cut of the block too.
        known = self._local_cost(weights, ~on_server)
        if not forced[self.n_feeding :].any():
            known = min(known, self._local_cost(weights, feeding))
        return self.network.solve(
            weights.device, weights.server, weights.transfer, on_device, on_server, known
        )

    def _local_cost(self, weights: CutWeights, device: Mask) -> float:
        crossing = self.network.crossing_sum(weights.transfer, device)
        return float(weights.device[device].sum() + weights.server[~device].sum()) + crossing


def find_blocks(graph: LayerGraph) -> tuple[Block, ...]:
    """Return the blocks of `graph` that have an inside."""
    passed = _passed_by_all(graph)
    starts = [graph.n_inputs, *(passed + 1)]
    stops = [*passed, graph.n]
    last_child = np.full(graph.n, -1)
    np.maximum.at(last_child, graph.edges[:, 0], graph.edges[:, 1])
    known: dict[bytes, tuple[float, float]] = {}
    blocks = []
    for start, stop in zip(starts, stops, strict=True):
        if start < stop:
            block = _block(graph, int(start), int(stop), last_child)
            key = _signature(graph, block)
            if key not in known:
                known[key] = (block.least(graph.output_bytes), block.least(graph.gradient_bytes))
            up, down = known[key]
            blocks.append(replace(block, up_bytes=up, down_bytes=down))
    return tuple(blocks)


def _passed_by_all(graph: LayerGraph) -> Ints:
    """Return the vertices, inputs aside, that are before or behind every other one."""
    first, n = graph.n_inputs, graph.n
    change = np.zeros(n + 1, dtype=np.int64)
    inner = graph.edges[graph.edges[:, 0] >= first]
    # Nobody passes a vertex on an edge that leads round it.
    np.add.at(change, inner[:, 0] + 1, 1)
    np.add.at(change, inner[:, 1], -1)
    # A vertex fed by inputs alone is behind none of the earlier ones, ...
    fed = np.zeros(n, dtype=bool)
    fed[inner[:, 1]] = True
    alone = np.flatnonzero(~fed[first:]) + first
    change[first] += len(alone)
    np.add.at(change, alone, -1)
    # ... one that feeds nothing is before none of the later ones.
    dead_ends = np.flatnonzero(graph.n_children[first:] == 0) + first
    np.add.at(change, dead_ends + 1, 1)
    later = graph.requires[graph.requires[:, 0] < graph.requires[:, 1]]
    # Nor does a block end at what something inside requires: then not all inside may be kept.
    np.add.at(change, later[:, 0], 1)
    np.add.at(change, later[:, 1] + 1, -1)
    around = np.cumsum(change[:n])
    return np.flatnonzero((around == 0) & (np.arange(n) >= first))


def _block(graph: LayerGraph, start: int, stop: int, last_child: Ints) -> Block:
    end = min(stop, graph.n - 1)
    edges = graph.edges[(graph.edges[:, 1] >= start) & (graph.edges[:, 1] <= end)]
    inputs = np.arange(graph.n_inputs)
    always = inputs[last_child[inputs] > end]
    edges = edges[~np.isin(edges[:, 0], always)]
    feeding = np.unique(edges[edges[:, 0] < start, 0])
    vertices = np.concatenate([feeding, np.arange(start, end + 1)])
    needs = graph.requires[(graph.requires >= start).all(1) & (graph.requires <= end).all(1)]
    places = (np.searchsorted(vertices, pairs) for pairs in (edges, needs))
    network = CutNetwork(len(vertices), *places)
    return Block(start, stop, vertices, len(feeding), always, network)


def _signature(graph: LayerGraph, block: Block) -> bytes:
    """Return what the bounds of a block depend on, so that equal blocks are solved once."""
    values = (graph.output_bytes, graph.gradient_bytes)
    local = [column[block.vertices].tobytes() for column in values]
    sent = [column[block.always].tobytes() for column in values]
    return b"|".join([block.network.pairs.tobytes(), *local, *sent])
