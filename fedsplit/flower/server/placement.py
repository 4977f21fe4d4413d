"""Where a turn runs on the servers: in this process, and at an edge that is a node of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.flower.node.edge import EdgeBranch, EdgeTurn
from fedsplit.flower.server.edges import EdgeTicket, RemoteEdges
from fedsplit.flower.server.host import OpenTurn, StageHost
from fedsplit.plan import DEVICE, EDGE, Branch, Turn
from fedsplit.seeds import derive_seed
from fedsplit.transport import TurnBounds, new_token


@dataclass(frozen=True)
class Seat:
    """A turn's place on the servers.

    Parameters
    ----------
    host : StageHost
        The servers of this process.
    opened : OpenTurn or None
        On those of this process; None on a route that never leaves the device.
    address, token : str
        Where the device's link leads, and what lets it in; empty on such a route.
    ticket : EdgeTicket or None
        At an edge that is a node of its own.
    place : int
        Of the turn in the ticket's branch.
    """

    host: StageHost
    opened: OpenTurn | None
    address: str = ""
    token: str = ""
    ticket: EdgeTicket | None = None
    place: int = 0

    @property
    def stays(self) -> bool:
        """Whether what is trained on the device and at the edge stays there after the turn."""
        return self.ticket is not None and self.ticket.branch.at_edge

    @property
    def adapters_on_link(self) -> bool:
        """Whether the device fetches its adapters over its link."""
        return self.opened is not None and self.opened.adapters_on_link

    def supply(self, adapters: Mapping[str, Tensor]) -> None:
        """Bring the turn the adapters that it starts from, on the servers of this process."""
        if self.opened is not None:
            self.host.supply(self.opened, adapters)

    def judge(self, counted: Sequence[int]) -> None:
        """Tell the edge which turns of a wave count, by place.

        Raises
        ------
        FedsplitError
            If it has failed.
        """
        if self.ticket is not None:
            if self.ticket.failure is not None:
                raise FedsplitError(self.ticket.failure)
            self.ticket.judge(counted)

    def finish(self) -> dict[str, Tensor]:
        """Return what a turn that is done trained on the servers of this process."""
        return self.host.finish(self.opened) if self.opened is not None else {}

    def link_bytes(self) -> dict[str, int]:
        """Return the bytes of the links between the servers of this process."""
        return self.opened.link_bytes() if self.opened is not None else {}

    def edge_bytes(self) -> dict[str, int]:
        """Return the bytes of the link from an edge that is a node, once it has answered."""
        return self.ticket.link_bytes.get(self.place, {}) if self.ticket is not None else {}

    def discard(self) -> None:
        """Forget the turn in this process; a device that still trains it is refused."""
        if self.opened is not None:
            self.host.discard(self.opened)


class Seating:
    """Gives turns their seats.

    Parameters
    ----------
    host : StageHost
        The servers of this process.
    edges : RemoteEdges or None
        The edges, if they are nodes of their own.
    seed : int
        Root of the turns' seeds.
    """

    def __init__(self, host: StageHost, edges: RemoteEdges | None, seed: int) -> None:
        self._host = host
        self._edges = edges
        self._root = seed

    def seed(self, server_round: int, turn: Turn) -> int:
        """Return the seed of a turn, the same on every tier."""
        again = [turn.repeat] if turn.repeat else []
        return derive_seed(self._root, "turn", server_round, turn.device, *again)

    def take(
        self,
        server_round: int,
        branch: Branch,
        adapters: Mapping[str, Tensor],
        *,
        train: bool,
        adapters_on_link: bool = False,
        weights: Sequence[float] = (1.0,),
        bounds: Sequence[TurnBounds],
    ) -> list[Seat]:
        """Return seats for all turns of `branch`; those of this process wait for their adapters.

        Parameters
        ----------
        server_round : int
            The round.
        branch : Branch
            A single turn, or one whose adapters stay at an edge.
        adapters : mapping of str to Tensor
            What an edge that is a node starts from.
        train : bool
            Whether turns train.
        adapters_on_link : bool
            Whether devices fetch their adapters from the first server.
        weights : sequence of float
            How much each turn counts where an edge averages.
        bounds : sequence of TurnBounds
            How much each turn may ask of its servers.

        Raises
        ------
        FedsplitError
            If the plan names no edge, or one that does not exist.
        """
        elsewhere = EDGE if self._edges is not None else ""
        opened = [
            None
            if len(turn.route.segments) == 1
            else self._host.open(
                turn,
                seed=self.seed(server_round, turn),
                train=train,
                elsewhere=elsewhere,
                adapters_on_link=adapters_on_link,
                bounds=allowed,
            )
            for turn, allowed in zip(branch.turns, bounds, strict=True)
        ]
        first = branch.turns[0]
        if self._edges is None or not first.route.on(EDGE):
            return [
                Seat(self._host, one, one.address, one.token) if one else Seat(self._host, None)
                for one in opened
            ]
        here = [one for one in opened if one is not None]
        if first.edge is None:
            raise FedsplitError(f"device {first.device}: its plan names no edge for {first.route}")
        address = self._edges.address(first.edge)
        tiers = (DEVICE, EDGE) if branch.at_edge else (EDGE,)
        names = [name for tier in tiers for name in self._host.adapter_names(first.route, tier)]
        turns = tuple(
            EdgeTurn(
                token=new_token(),
                route=str(turn.route),
                n_blocks=turn.route.n_blocks,
                codec=turn.codec,
                seed=self.seed(server_round, turn),
                onward_address=one.address,
                onward_token=one.token,
                steps=allowed.steps or 0,
                weight=weight,
            )
            for turn, one, weight, allowed in zip(branch.turns, here, weights, bounds, strict=True)
        )
        ticket = EdgeTicket(
            edge=first.edge,
            branch=EdgeBranch(turns, branch.width, branch.at_edge),
            adapters={name: adapters[name] for name in names},
            train=train,
            links_done=lambda: all(self._host.is_over(one) for one in here),
        )
        self._edges.hand_out(ticket)
        return [
            Seat(self._host, one, address, turn.token, ticket, place)
            for place, (one, turn) in enumerate(zip(here, turns, strict=True))
        ]
