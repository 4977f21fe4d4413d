"""How long who waits for whom: one object, the same on the server and on every node."""

from dataclasses import dataclass

from fedsplit.errors import require

MOST_PING_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Time limits of a run, in seconds.

    Parameters
    ----------
    connect_s : float
        Until one more of the nodes that are missing at the start is there, and for a node until its
        server is.
    start_s : float or None
        Until a node that was sent a task has come, and until its answer is there once its process
        has left; None: `deadline_s`. It includes what Flower needs to start a process.
    deadline_s : float
        Until a turn is over, from the moment its device is present.
    reply_s : float
        Until a call over a link is answered, which may have to queue behind other turns, and
        until a turn that was entered early has its adapters.
    backward_s : float
        Until the device of a U-shaped route sends its gradients after a forward pass.
    last_words_s : float
        Until a node that is gone is given up, if it still may say why.
    ping_s : float
        Between keep-alive pings; who hangs or is cut off is noticed within three of them.

    Raises
    ------
    SettingsError
        If a limit is not above 0, or pings are out of range.
    """

    connect_s: float = 60.0
    start_s: float | None = None
    deadline_s: float = 600.0
    reply_s: float = 600.0
    backward_s: float = 120.0
    last_words_s: float = 1.0
    ping_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("connect_s", "deadline_s", "reply_s", "backward_s", "last_words_s"):
            value = getattr(self, name)
            require(0 < value < float("inf"), name, value, "above 0 and finite")
        started = self.start_s is None or 0 < self.start_s < float("inf")
        require(started, "start_s", self.start_s, "null, or above 0 and finite")
        allowed = f"0.1 to {MOST_PING_S:g} s"
        require(0.1 <= self.ping_s <= MOST_PING_S, "ping_s", self.ping_s, allowed)

    @property
    def to_start_s(self) -> float:
        """`start_s`, or what stands for it; never above `deadline_s`."""
        return self.deadline_s if self.start_s is None else min(self.start_s, self.deadline_s)
