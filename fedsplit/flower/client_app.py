"""Any node of a federation as a Flower ClientApp."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.flower.node import edge
from fedsplit.flower.node.device import Device, Loader


def client_app(load_data: Loader | None = None) -> ClientApp:
    """Return the app of devices, and of edges (nodes started with ``role="edge"``).

    Parameters
    ----------
    load_data : callable, optional
        ``load_data(context) -> train, test``: a device's own samples, each a mapping of the
        model's inputs (`input_ids`, `labels` ...) of one shape. By default a device holds its
        part of the data set that the server's job names.

    Examples
    --------
    >>> app = client_app(lambda context: (my_train_rows, my_test_rows))
    """
    app = ClientApp()
    device = Device(load_data)

    @app.query("node")
    def hello(message: Message, context: Context) -> Message:
        is_edge = context.node_config.get("role", "device") == "edge"
        return edge.hello(message, context) if is_edge else device.hello(message, context)

    app.train("device")(device.train)
    app.evaluate("device")(device.evaluate)
    app.train("edge")(edge.serve)
    return app
