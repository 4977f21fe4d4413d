"""How a run is carried out, and who is told of it."""

from dataclasses import dataclass, field

from flwr.app import ArrayRecord, MetricRecord

from fedsplit.errors import require, require_choice
from fedsplit.execution.aggregate import AGGREGATIONS, MEAN
from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.server.listener import Listener
from fedsplit.flower.server.outcome import ABSURD_NORM, RoundOutcome
from fedsplit.plan import RoundPlan
from fedsplit.schemes.turnout import Waiting


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How a run is carried out.

    Parameters
    ----------
    n_edges : int
        Edge servers that are nodes of their own; other edges are hosted by this process.
    places : int or None
        Nodes that can work at once, in a simulation; None: each has a machine of its own.
    start_ahead : bool
        Whether the next devices of a branch are started while the present ones train.
    first_round : int
        The round to begin with; above 1 when a run is resumed.
    evaluate_every : int
        Evaluate on the devices after every so many rounds, and always after the last.
    quorum : int
        The run stops if fewer branches of a round survive.
    waiting : Waiting
        Whom a round waits for on the modelled system, and what becomes of the others.
    max_update_norm : float
        A turn is lost if its adapters move farther than this, in the norm over all of them.
    aggregation : str
        How the adapters of branches become one, of `fedsplit.execution.aggregate.AGGREGATIONS`.
        With ``mean`` the wrapped strategy has a reply of each branch; else one reply in all.
    link : LinkSettings or None
        Where nodes reach the server, and the keys with which they log in; None: a Unix socket,
        for nodes on this machine.

    Raises
    ------
    SettingsError
        If a number is out of range.
    """

    n_edges: int = 0
    places: int | None = None
    start_ahead: bool = False
    first_round: int = 1
    evaluate_every: int = 1
    quorum: int = 1
    waiting: Waiting = field(default_factory=Waiting)
    max_update_norm: float = ABSURD_NORM
    aggregation: str = MEAN
    link: LinkSettings | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("n_edges", 0), ("first_round", 1), ("evaluate_every", 1), ("quorum", 1)
        ):  # fmt: skip
            require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        require_choice("aggregator.adapters", self.aggregation, AGGREGATIONS)
        norm = self.max_update_norm
        require(norm > 0, "max_update_norm", norm, "above 0")


class RunEnds(Exception):
    """Ends a run in good order before its last round; its text says why."""


class RunListener(Listener):
    """Is told how a run goes on; override what is of interest."""

    def on_round(
        self, outcome: RoundOutcome, arrays: ArrayRecord, metrics: MetricRecord | None
    ) -> None:
        """Take what came out of a round and the global adapters; round 0 is the evaluation.

        Raises
        ------
        RunEnds
            If it shall be the last.
        """

    def on_plan(self, server_round: int, plan: RoundPlan) -> None:
        """Take the plan of a round before anything of it is sent.

        Raises
        ------
        RunEnds
            If the run shall end before it.
        """
