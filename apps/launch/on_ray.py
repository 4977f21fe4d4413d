"""Flower's own simulation engine, on Ray, for machines with many processors or GPUs."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from .. import client_app, server_app
from ..config import load_config
from .engine import Order


def simulate(order: Order) -> None:
    """Carry out `order`, on a Ray that `ray_environment` keeps to itself.

    Raises
    ------
    Exception
        What the server, Flower or Ray raises.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        server_app.run_job(grid, load_config(order.overrides), Path(order.output))

    run_simulation(
        app,
        client_app.app,
        order.devices,
        backend_config={
            "client_resources": {"num_cpus": 1},
            "init_args": {"num_cpus": order.places},
        },
    )
