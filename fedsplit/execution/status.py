"""How a turn stands on a stage."""

from dataclasses import dataclass, field

from fedsplit.transport import LinkStats

WAITING, ACTIVE, DONE, FAILED = "waiting", "active", "done", "failed"


@dataclass(frozen=True)
class TurnStatus:
    """How a turn stands on a stage.

    Parameters
    ----------
    state : str
        "waiting" (its link has not been opened), "active", "done" or "failed".
    steps : int
        Mini-batches trained or evaluated.
    reason : str
        Why it failed.
    stats : LinkStats
        Bytes that the stage's own link to the next tier carried; known once "done".
    """

    state: str = WAITING
    steps: int = 0
    reason: str = ""
    stats: LinkStats = field(default_factory=LinkStats)
