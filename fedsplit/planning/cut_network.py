"""Minimum s-t cuts of layer graphs by integer maximum flow."""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from fedsplit.arrays import Array

Mask = NDArray[np.bool_]
Pairs = NDArray[np.int64]

# Two opposite edges of this capacity still leave a residual below 2**31.
_INFINITE = 2**30 - 1
EXACT_BELOW = _INFINITE // 2
"""Whole-number costs below this are cut without rounding."""


class CutNetwork:
    """The flow network of a graph; only capacities change from one solve to the next.

    Nodes are the vertices, one auxiliary node for every vertex with several children (its tensor
    is sent once, however many of them are on the other side), a source (device) and a sink
    (server). Edges of infinite capacity from child to parent keep the device's part closed under
    "parent of".

    Parameters
    ----------
    n : int
        Number of vertices.
    edges : int array, shape [*, 2]
        (parent, child) pairs.
    requires : int array, shape [*, 2]
        Pairs (v, u): v on the device requires u on the device.
    """

    def __init__(self, n: int, edges: Pairs, requires: Pairs) -> None:
        self._n = n
        self.pairs = np.concatenate([edges, [[-1, -1]], requires])
        self._edges = edges
        parent, child = edges[:, 0], edges[:, 1]
        several = np.bincount(parent, minlength=n) > 1
        auxiliary = np.where(several, n + np.cumsum(several) - 1, -1)
        source, sink = n + int(several.sum()), n + int(several.sum()) + 1
        self._source = source
        single = ~several[parent]
        many = np.flatnonzero(several)
        vertices = np.arange(n)
        infinite = [
            (child, parent),
            (auxiliary[parent[~single]], child[~single]),
            (requires[:, 0], requires[:, 1]),
        ]
        sending = np.concatenate([parent[single], many])
        receiving = np.concatenate([child[single], auxiliary[many]])
        finite = [
            (sending, receiving),
            (np.full(n, source), vertices),
            (vertices, np.full(n, sink)),
        ]
        tail = np.concatenate([pair[0] for pair in (*infinite, *finite)])
        head = np.concatenate([pair[1] for pair in (*infinite, *finite)])
        size = sink + 1
        # The solver wants every edge in both directions.
        keys = np.unique(np.concatenate([tail * size + head, head * size + tail]))
        slot = np.searchsorted(keys, tail * size + head)
        closing, sent, from_source, to_sink = np.split(
            slot, np.cumsum([sum(len(pair[0]) for pair in infinite), len(sending), n])
        )
        is_infinite = np.zeros(len(keys), dtype=bool)
        is_infinite[closing] = True
        # Where a vertex requires its only child too, the infinite edge between them stays.
        finite_still = ~is_infinite[sent]
        self._transfer_slot, self._transfer_vertex = sent[finite_still], sending[finite_still]
        self._source_slot, self._sink_slot = from_source, to_sink
        self._indices = (keys % size).astype(np.int32)
        self._indptr = np.searchsorted(keys, np.arange(size + 1) * size).astype(np.int32)
        self._base = np.where(is_infinite, _INFINITE, 0).astype(np.int32)
        self._shape = (size, size)

    def solve(
        self,
        device: Array,
        server: Array,
        transfer: Array,
        on_device: Mask,
        on_server: Mask,
        known: float,
    ) -> Mask:
        """Return the vertices on the device in a minimum cut.

        Parameters
        ----------
        device, server, transfer : float array, shape [n]
            What a vertex costs on the device, on the server, and what sending its output costs.
        on_device, on_server : bool array, shape [n]
            Vertices whose side is fixed.
        known : float
            Cost of an allowed cut. Capacities are rounded to `known` / 2**30, so that the cut
            returned is within ``(cut edges) * known / 2**30`` of the best.
        """
        shared = np.minimum(device, server)
        shared[on_device] = device[on_device]
        shared[on_server] = server[on_server]
        limit = known - float(shared.sum())
        # Half the largest capacity: what is clipped is still dearer than the known cut.
        scale = EXACT_BELOW / limit if limit > 0 else np.inf
        if not np.isfinite(scale):
            scale = float(EXACT_BELOW)
        if scale > 1:
            scale = np.floor(scale)  # whole numbers stay exact
        capacity = self._base.copy()
        capacity[self._transfer_slot] = _rounded(transfer[self._transfer_vertex], scale)
        capacity[self._source_slot] = _rounded(server - shared, scale)
        capacity[self._sink_slot] = _rounded(device - shared, scale)
        capacity[self._source_slot[on_device]] = _INFINITE
        capacity[self._sink_slot[on_device]] = 0
        capacity[self._sink_slot[on_server]] = _INFINITE
        capacity[self._source_slot[on_server]] = 0
        graph = csr_array((capacity, self._indices, self._indptr), shape=self._shape)
        flow = maximum_flow(graph, self._source, self._source + 1).flow
        residual = capacity - flow.data > 0
        pointers = np.concatenate([[0], np.cumsum(residual)])[self._indptr]
        kept = self._indices[residual]
        rest = csr_array((np.ones(len(kept)), kept, pointers), shape=self._shape)
        reached = breadth_first_order(rest, self._source, return_predecessors=False)
        chosen = np.zeros(self._shape[0], dtype=bool)
        chosen[reached] = True
        return chosen[: self._n]

    def crossing_sum(self, values: Array, device: Mask) -> float:
        """Return the sum of `values` over the vertices of `device` with a child outside."""
        parent, child = self._edges[:, 0], self._edges[:, 1]
        sent = np.zeros(self._n, dtype=bool)
        sent[parent[device[parent] & ~device[child]]] = True
        return float(values[sent].sum())


def _rounded(values: Array, scale: float) -> NDArray[np.int32]:
    return np.rint(np.clip(values * scale, 0, _INFINITE)).astype(np.int32)
