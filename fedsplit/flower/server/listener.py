"""Who is told how a run goes on."""

from fedsplit.flower.server.roster import Roster
from fedsplit.plan import Failure


class Listener:
    """Is told how a run goes on; by default it does not care."""

    def on_nodes(self, roster: Roster) -> None:
        """Take who takes part, and what their data are, before the first round."""

    def on_progress(self, phase: str, done: int, planned: int) -> None:
        """Take the phase ("train", "evaluate") and its mini-batches, about once a second."""

    def on_failure(self, failure: Failure) -> None:
        """Take a failure of a device or edge, when it is noticed."""
