"""The Flower ClientApp: a device of the fleet, or an edge server."""

from fedsplit.flower import client_app

app = client_app()
