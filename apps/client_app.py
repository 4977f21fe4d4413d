"""The Flower ClientApp: a device of the fleet, or an edge server."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.flower.node import device, edge

app = ClientApp()


@app.query("node")
def hello(message: Message, context: Context) -> Message:
    """Say which device or edge this is."""
    return device.hello(message, context)


@app.train("device")
def train(message: Message, context: Context) -> Message:
    """Train one turn."""
    return device.train(message, context)


@app.evaluate("device")
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on this device's test data."""
    return device.evaluate(message, context)


@app.train("edge")
def serve(message: Message, context: Context) -> Message:
    """Serve an edge's turns, in training and evaluation."""
    return edge.serve(message, context)
