"""When the stages of mini-batches run of which several are under way at once.

A device sends a mini-batch and begins the next one before the answer is there; the machines behind
it take mini-batches as they come. So an update of few of them takes about as long as whoever has
most to do, and the first one's way there and the last one's way back.
"""

from collections import deque

import numpy as np

from fedsplit.arrays import Array
from fedsplit.fleet.steps import Stage
from fedsplit.pace import Pace


def run_ahead(
    stages: tuple[Stage, ...],
    seconds: Array,
    pace: Pace,
    served: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Return when each stage of each mini-batch starts and ends, after its turn begins to train.

    Every device, link and turn's part of a server does one thing at a time, in order.

    Parameters
    ----------
    stages : tuple of Stage
        Of a mini-batch that leaves the device and comes back: the device's forward pass, links,
        servers with the links between them, links, the device's backward pass.
    seconds : ndarray
        What each takes, shape ``[turns, steps, stages]``; 0 in steps beyond a turn's last.
    pace : Pace
        Which mini-batches are under way together.
    served : tuple of ndarray, optional
        When visits to servers begin and end, ``[turns, steps, visits]`` each; at once by default.

    Returns
    -------
    tuple of ndarray
        Starts and ends, shape ``[turns, steps, stages]``.
    """
    visits = [j for j, stage in enumerate(stages) if stage.on_server]
    first, last = visits[0], visits[-1]
    starts, ends = np.zeros_like(seconds), np.zeros_like(seconds)
    free = np.zeros((len(seconds), len(stages)))  # when each link is done with the last mini-batch
    device = behind = np.zeros(len(seconds))

    def run(step: int, j: int, since: Array) -> Array:
        starts[:, step, j] = since
        ends[:, step, j] = since + seconds[:, step, j]
        return ends[:, step, j]

    def links(step: int, which: range, since: Array) -> Array:
        for j in which:
            since = run(step, j, np.maximum(since, free[:, j]))
            free[:, j] = since
        return since

    under_way: deque[int] = deque()
    back_s = np.zeros(seconds.shape[:2])
    n_steps = seconds.shape[1]
    for step in range(n_steps):
        device = run(step, 0, device)
        behind = np.maximum(behind, links(step, range(1, first), device))
        for j in range(first, last + 1):
            behind = run(step, j, behind)
            if served is not None and j in visits:
                begin, behind = (times[:, step, visits.index(j)] for times in served)
                starts[:, step, j], ends[:, step, j] = begin, behind
        back_s[:, step] = links(step, range(last + 1, len(stages) - 1), behind)
        under_way.append(step)
        whole = (step + 1) % pace.update == 0 or step + 1 == n_steps
        while under_way and (whole or len(under_way) == pace.at_once):
            done = under_way.popleft()
            device = run(done, len(stages) - 1, np.maximum(device, back_s[:, done]))
    return starts, ends
