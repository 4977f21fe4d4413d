"""Where turns run on the servers: in this process, and at edges that are nodes of their own."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedsplit.errors import PlanError
from fedsplit.execution import OptimizerSpec
from fedsplit.flower.server.edges import Assignment, RemoteEdges
from fedsplit.flower.server.host import StageHost
from fedsplit.flower.server.turn_run import TurnRun
from fedsplit.flower.tasks import Contact, EdgeBranch, EdgeTurn
from fedsplit.plan import DEVICE, EDGE, AdapterWay, Branch, Turn
from fedsplit.seeds import derive_seed
from fedsplit.transport import new_token


class Placement:
    """Gives turns their places.

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

    def one(
        self,
        server_round: int,
        turn: Turn,
        *,
        optimizer: OptimizerSpec | None,
        steps: int,
        way: AdapterWay,
    ) -> TurnRun:
        """Return a turn that this process holds, but for an edge that is a node.

        It has `steps` mini-batches: exactly so many if it has an `optimizer`, else at most.
        """
        seed = self.seed(server_round, turn)
        elsewhere = EDGE if self._edges is not None else ""
        stages = self._host.open(
            turn, seed=seed, optimizer=optimizer, steps=steps, way=way, elsewhere=elsewhere
        )
        door = Contact(self._host.address, stages[-1][1]) if stages else None
        return TurnRun(
            turn=turn,
            seed=seed,
            # On a route that never leaves the device there is no link to carry adapters.
            way=way if len(turn.route.segments) > 1 else AdapterWay.MESSAGE,
            host=self._host,
            stages=stages,
            door=door,
            optimizer=optimizer,
        )

    def at_remote_edge(
        self,
        server_round: int,
        branch: Branch,
        adapters: Mapping[str, Tensor],
        *,
        optimizer: OptimizerSpec | None,
        steps: Sequence[int],
        way: AdapterWay,
        weights: Sequence[float] = (1.0,),
    ) -> list[TurnRun]:
        """Return all turns of `branch`, handed to their edge together, which is a node.

        Parameters
        ----------
        server_round : int
            The round.
        branch : Branch
            A single turn, or one whose adapters stay at its edge.
        adapters : mapping of str to Tensor
            What it starts from.
        optimizer : OptimizerSpec or None
            What trains them; None if they evaluate.
        steps : sequence of int
            Mini-batches of each turn; at most so many if they do not train.
        way : AdapterWay
            How adapters reach the devices; with `AdapterWay.EDGE` they stay at the edge.
        weights : sequence of float
            How much each turn counts where the edge averages.

        Raises
        ------
        NodeLost
            If no node is this edge.
        """
        edges, first = self._edges, branch.turns[0]
        if any(turn.frozen or turn.rank is not None for turn in branch.turns):
            raise PlanError(
                f"device {first.device}: must train all its adapters behind an edge node"
            )
        if optimizer is not None and any(turn.codec.over_turns for turn in branch.turns):
            raise PlanError(f"device {first.device}: over_turns must be false behind an edge node")
        assert edges is not None
        assert first.edge is not None
        address = edges.address(first.edge)
        stays = way is AdapterWay.EDGE
        tiers = (DEVICE, EDGE) if stays else (EDGE,)
        names = [name for tier in tiers for name in self._host.adapter_names(first.route, tier)]
        waves = branch.waves
        trainers = [
            optimizer and optimizer.within(number, len(waves))
            for number, wave in enumerate(waves)
            for _ in wave
        ]
        runs = [
            self.one(server_round, turn, optimizer=trainer, steps=count, way=way)
            for turn, trainer, count in zip(branch.turns, trainers, steps, strict=True)
        ]
        turns = tuple(
            EdgeTurn(
                token=new_token(),
                turn=run.turn,
                steps=count,
                seed=run.seed,
                onward=run.door,
                optimizer=run.optimizer,
                weight=weight,
            )
            for run, weight, count in zip(runs, weights, steps, strict=True)
        )
        assignment = Assignment(
            edge=first.edge,
            branch=EdgeBranch(turns, branch.width, stays),
            adapters={name: adapters[name] for name in names},
            optimizer=optimizer,
            links_done=lambda: all(run.links_over() for run in runs),
        )
        edges.hand_out(assignment)
        for place, (run, turn) in enumerate(zip(runs, turns, strict=True)):
            run.assignment, run.place, run.door = assignment, place, Contact(address, turn.token)
        return runs
