"""Where to cut a model: the device part of least delay (Fast AI model splitting, 2507.01041).

Three exact methods, from the most general to the fastest: a minimum s-t cut of the whole graph, the
same on single blocks between vertices that every path passes (most of which a bound rules out), and
a scan for graphs that are chains.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedsplit.arrays import Array
from fedsplit.errors import require, require_choice
from fedsplit.layergraph import LayerGraph
from fedsplit.planning.cut_blocks import Block, Prefixes, find_blocks
from fedsplit.planning.cut_cost import (
    CutCost,
    CutLimits,
    CutSystem,
    CutWeights,
    cut_cost,
    cut_weights,
    memory_weights,
)
from fedsplit.planning.cut_network import CutNetwork
from fedsplit.planning.errors import InfeasibleError

Mask = NDArray[np.bool_]
METHODS = ("auto", "general", "blockwise", "chain")
_NO_LIMITS = CutLimits()
_MAX_PRICES = 60


@dataclass(frozen=True, eq=False)
class CutResult:
    """A cut and what it costs.

    Parameters
    ----------
    device : bool array, shape [n]
        Vertices on the device.
    objective : float
        Delay plus weighted energy of a turn, in seconds.
    bound : float
        No allowed cut has a smaller objective. It equals `objective`, up to the rounding of
        integer flows (about 1e-6), unless a memory limit binds.
    """

    graph: LayerGraph
    system: CutSystem
    device: Mask
    objective: float
    bound: float

    @cached_property
    def cost(self) -> CutCost:
        """The terms of the objective, energy and memory."""
        return cut_cost(self.graph, self.system, self.device)

    @property
    def n_blocks(self) -> int:
        """Number of blocks that lie wholly on the device, counted from the first."""
        left = self.graph.block[~self.device & (self.graph.block >= 0)]
        return int(left.min()) if left.size else self.graph.n_blocks


class CutSolver:
    """Finds cuts of one graph, again and again for changing systems.

    What depends on the graph alone is prepared once, on first use.
    """

    def __init__(self, graph: LayerGraph) -> None:
        self._graph = graph
        self._order = np.arange(graph.n)
        self._inputs = self._order < graph.n_inputs
        self._prefixes = Prefixes(graph)
        self._known_forced: dict[tuple[int, tuple[int, ...]], Mask] = {(0, ()): self._inputs}

    @cached_property
    def _network(self) -> CutNetwork:
        return CutNetwork(self._graph.n, self._graph.edges, self._graph.requires)

    @cached_property
    def _blocks(self) -> "_Blocks":
        return _Blocks(find_blocks(self._graph))

    def solve(
        self, system: CutSystem, limits: CutLimits = _NO_LIMITS, method: str = "auto"
    ) -> CutResult:
        """Return the best cut for `system` under `limits`.

        Parameters
        ----------
        system : CutSystem
        limits : CutLimits
            A memory limit cannot be part of a minimum cut. Where it binds, memory is priced by a
            Lagrange multiplier: the cut respects the limit but may not be the best one, and
            `CutResult.bound` says how far from it.
        method : str
            "general", "blockwise", "chain" (for chains only) or "auto", the fastest that fits.
            All find the same optimum; a memory limit that binds always takes "general".

        Raises
        ------
        InfeasibleError
            If no cut respects the limits, naming the limit and by how much it is missed.
        FedsplitError
            If the method does not fit the graph, or a codec ratio's shape.
        """
        require_choice("method", method, METHODS)
        graph = self._graph
        require(method != "chain" or graph.is_chain, "method", method, "another: not a chain")
        for name in ("uplink_ratio", "downlink_ratio"):
            shape = np.shape(getattr(system, name))
            require(shape in ((), (graph.n,)), f"{name}.shape", shape, f"() or {(graph.n,)}")
        key = (limits.min_blocks, limits.on_device)
        forced = self._known_forced.get(key)
        if forced is None:
            forced = self._known_forced[key] = self._forced(limits)
        if limits.device_memory_bytes < np.inf:
            return self._within_memory(system, limits, forced)
        if method == "general":
            weights = cut_weights(graph, system)
            device, objective = self._general(weights, forced)
        else:
            device, objective = self._prefix(self._prefixes.costs(system), forced)
            if not (method == "chain" or graph.is_chain):
                device, objective = self._inside_blocks(system, forced, device, objective)
        return CutResult(graph, system, device, objective, objective)

    def _forced(self, limits: CutLimits) -> Mask:
        """Return the vertices that must be on the device, with all that they need."""
        graph = self._graph
        if limits.min_blocks > graph.n_blocks:
            raise InfeasibleError(
                f"min_blocks of {graph.name}", limits.min_blocks, graph.n_blocks, "blocks"
            )
        require(
            all(vertex < graph.n for vertex in limits.on_device),
            "on_device",
            limits.on_device,
            f"vertices 0 to {graph.n - 1}",
        )
        forced = self._inputs | (limits.min_blocks > 0) & (graph.block < limits.min_blocks)
        forced[list(limits.on_device)] = True
        needs = np.concatenate([graph.edges[:, ::-1], graph.requires])
        while (missing := needs[forced[needs[:, 0]] & ~forced[needs[:, 1]], 1]).size:
            forced[missing] = True
        return forced

    def _prefix(self, costs: Array, forced: Mask) -> tuple[Mask, float]:
        """Return the best prefix that holds `forced`."""
        first = 0
        if forced is not self._inputs:
            first = int(np.searchsorted(self._prefixes.sizes, np.flatnonzero(forced)[-1] + 1))
        best = first + int(costs[first:].argmin())
        return self._order < self._prefixes.sizes[best], float(costs[best])

    def _general(self, weights: CutWeights, forced: Mask) -> tuple[Mask, float]:
        """Return the best cut by a maximum flow through the whole graph."""
        prefix, known = self._prefix(self._prefixes.weighted(weights), forced)
        none = np.zeros_like(forced)
        device = self._network.solve(
            weights.device, weights.server, weights.transfer, forced, none, known
        )
        objective = _objective(self._graph, weights, device)
        return (device, objective) if objective < known else (prefix, known)

    def _inside_blocks(
        self, system: CutSystem, forced: Mask, device: Mask, objective: float
    ) -> tuple[Mask, float]:
        """Return the best cut, given the best prefix: solve the blocks that might hold better."""
        weights = cut_weights(self._graph, system)
        bounds = self._blocks.bounds(system, weights)
        slack = 1e-12 * objective  # prefix sums and bounds add up in different orders
        open_blocks = np.flatnonzero(bounds < objective - slack)
        last = np.flatnonzero(forced)[-1] if open_blocks.size else 0
        for index in open_blocks[np.argsort(bounds[open_blocks])]:
            block = self._blocks.items[index]
            if bounds[index] >= objective - slack:
                break
            if last < block.stop:
                candidate = block.cut(weights, forced)
                cost = _objective(self._graph, weights, candidate)
                if cost < objective:
                    device, objective = candidate, cost
        return device, objective

    def _within_memory(self, system: CutSystem, limits: CutLimits, forced: Mask) -> CutResult:
        """Return a good cut within the device's memory, and a bound on the best.

        The multiplier is found by the method of two lines: each new price is where the priced
        objectives of the best cuts on either side of the limit meet.
        """
        graph, cap = self._graph, limits.device_memory_bytes
        memory, weights = memory_weights(graph, system), cut_weights(graph, system)
        least = float(memory[forced].sum())
        if least > cap:
            part = f"the smallest device part of {graph.name}, {limits.min_blocks} blocks"
            raise InfeasibleError(f"device_memory_bytes for {part}", least, cap, "byte")
        device, objective = self._general(weights, forced)
        used = float(memory[device].sum())
        if used <= cap:
            return CutResult(graph, system, device, objective, objective)
        outside, bound = (objective, used), objective
        device, objective = forced, _objective(graph, weights, forced)
        inside = (objective, least)
        costs, sizes = self._prefixes.weighted(weights), self._prefixes.sizes
        fits = np.concatenate([[0.0], np.cumsum(memory)])[sizes] <= cap
        fits &= sizes > np.flatnonzero(forced)[-1]
        if fits.any() and costs[fits].min() < objective:
            best = int(np.where(fits, costs, np.inf).argmin())
            device, objective = self._order < sizes[best], float(costs[best])
        for _ in range(_MAX_PRICES):
            price = (inside[0] - outside[0]) / (outside[1] - inside[1])
            priced = replace(weights, device=weights.device + price * memory)
            found, value = self._general(priced, forced)
            bound = max(bound, value - price * cap)
            if value >= (outside[0] + price * outside[1]) * (1 - 1e-9):
                break
            point = (_objective(graph, weights, found), float(memory[found].sum()))
            if point[1] > cap:
                outside = point
            else:
                inside = point
                if point[0] < objective:
                    device, objective = found, point[0]
        return CutResult(graph, system, device, objective, min(bound, objective))


class _Blocks:
    """The blocks of a graph, and lower bounds on the cuts inside each."""

    def __init__(self, items: tuple[Block, ...]) -> None:
        self.items = items
        self._start = np.array([block.start for block in items], dtype=np.int64)
        self._stop = np.array([block.stop for block in items], dtype=np.int64)
        self._up = np.array([block.up_bytes for block in items])
        self._down = np.array([block.down_bytes for block in items])

    def bounds(self, system: CutSystem, weights: CutWeights) -> Array:
        """Return a lower bound on the objective of every block's inner cuts, shape [blocks].

        Inside, each vertex is where it is cheaper, and the least possible data crosses.
        """
        samples = 8 * system.batch * system.steps
        up = samples * (1 + system.energy_weight * system.transmit_watt) / system.uplink_bps
        before, behind = np.cumsum(weights.device), np.cumsum(weights.server)
        inside = np.cumsum(np.minimum(weights.device, weights.server))
        first, last = self._start - 1, self._stop - 1
        bounds: Array = (
            before[first]
            + (inside[last] - inside[first])
            + (behind[-1] - behind[last])
            + self._up * (up * np.min(system.uplink_ratio))
            + self._down * (samples / system.downlink_bps * np.min(system.downlink_ratio))
        )
        return bounds


def _objective(graph: LayerGraph, weights: CutWeights, device: Mask) -> float:
    """Return the objective of `device` under `weights`."""
    sent = graph.crossing(device)
    return float(
        weights.device[device].sum() + weights.server[~device].sum() + weights.transfer[sent].sum()
    )
