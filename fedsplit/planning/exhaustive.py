"""All possible cuts of a layer graph: what a solver's answer is compared with."""

import numpy as np
from numpy.typing import NDArray

from fedsplit.errors import require
from fedsplit.layergraph import LayerGraph


def every_cut(graph: LayerGraph, min_blocks: int, most: int | None = None) -> NDArray[np.bool_]:
    """Return all possible device parts with the first blocks in them, shape ``[cuts, n]``.

    Raises
    ------
    FedsplitError
        If they have more than `most` entries on the way.
    """
    needs: list[list[int]] = [[] for _ in range(graph.n)]
    for vertex, needed in [*graph.edges[:, ::-1].tolist(), *graph.requires.tolist()]:
        needs[vertex].append(needed)
    parts = [np.zeros(graph.n, dtype=bool)]
    for vertex in range(graph.n):
        longer = []
        for part in parts:
            if part[needs[vertex]].all():
                extended = part.copy()
                extended[vertex] = True
                longer.append(extended)
        stays = vertex < graph.n_inputs or (min_blocks > 0 and graph.block[vertex] < min_blocks)
        parts = longer if stays else parts + longer
        size = len(parts) * graph.n
        require(most is None or size <= most, "device parts", size, f"at most {most}")
    return np.array(parts)
