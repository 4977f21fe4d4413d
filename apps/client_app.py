"""The Flower ClientApp: a device of the fleet."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.flower import session

app = ClientApp()


@app.query("device")
def hello(message: Message, context: Context) -> Message:
    """Say which device this is and how much data it holds."""
    return session.hello(message, context)


@app.train("device")
def train(message: Message, context: Context) -> Message:
    """Train one turn."""
    return session.train(message, context)


@app.evaluate("device")
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on this device's test data."""
    return session.evaluate(message, context)
