"""The server's process of a simulated run."""

import socket
import traceback
from contextlib import suppress
from pathlib import Path

from fedsplit.errors import FedsplitError

from .. import server_app
from ..config import load_config
from .engine import FLOWER, Order
from .pool import Pool, PoolGrid


def serve(order: Order, root: socket.socket) -> int:
    """Carry out `order`; return the exit code, and tell the cause of a failure.

    Parameters
    ----------
    order : Order
        What to do.
    root : socket.socket
        Leads to the process that forks workers.
    """
    try:
        if order.engine == FLOWER:
            from .on_ray import simulate

            simulate(order)
        else:
            with Pool(root, order.places) as pool:
                grid = PoolGrid(pool, order.devices)
                server_app.run_job(grid, load_config(order.overrides), Path(order.output))
    except Exception as error:
        order.tell(_words(error))
        with suppress(OSError):  # the log's disk may be full
            traceback.print_exc()
        return 1
    return 0


def _words(error: BaseException) -> str:
    """Return what first went wrong: Flower wraps what others raised."""
    while error.__cause__ is not None and not isinstance(error, FedsplitError):
        error = error.__cause__
    return str(error) if isinstance(error, FedsplitError) else f"{type(error).__name__}: {error}"
