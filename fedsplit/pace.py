"""Which mini-batches are under way at the same time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Which mini-batches of a turn are under way together.

    Parameters
    ----------
    update : int
        Mini-batches of an update, at whose end none is under way.
    at_once : int
        How many of them are at most, on routes that leave the device and end at a server.
    """

    update: int = 1
    at_once: int = 1
