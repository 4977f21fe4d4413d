"""Who leaves a round."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedsplit.errors import require
from fedsplit.seeds import generator


@dataclass(frozen=True)
class DropoutSpec:
    """Devices that leave a round in the midst of it.

    Parameters
    ----------
    probability : float
        That a device leaves a round, in [0, 1). Whoever would be the last to leave stays.
    away_s : float or None
        Modelled seconds until it is back and goes on with its turn; None: it does not come back in
        this round, and its turn is lost.
    """

    probability: float = 0.0
    away_s: float | None = None

    def __post_init__(self) -> None:
        inside = 0 <= self.probability < 1
        require(inside, "fleet.dropout.probability", self.probability, "in [0, 1)")
        away_s = self.away_s
        back = away_s is None or 0 < away_s < math.inf
        require(back, "fleet.dropout.away_s", away_s, "null, or finite and above 0")

    def leaving(self, devices: Sequence[int], seed: int, server_round: int) -> tuple[int, ...]:
        """Return which of the `devices` of a round leave it; drawn for each by its index."""
        if self.probability == 0:
            return ()
        draws = generator(seed, "dropout", server_round).uniform(size=max(devices) + 1)
        last = max(devices, key=lambda device: float(draws[device]))
        return tuple(d for d in devices if draws[d] < self.probability and d != last)
