"""Split training under any Flower strategy."""

import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from logging import INFO, WARNING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from flwr.supercore import log

from fedsplit.errors import FedsplitError
from fedsplit.flower.messages import to_record
from fedsplit.flower.server.coordinator import Coordinator
from fedsplit.flower.server.outcome import (
    BranchOutcome,
    RoundOutcome,
    TurnOutcome,
    accuracy,
    mean_loss,
)
from fedsplit.flower.server.roster import DeviceGrid
from fedsplit.plan import EDGE, RoundPlan, Turn
from fedsplit.schemes.scene import Scene
from fedsplit.seeds import derive_seed

_NO_SURVIVOR = 1


@dataclass(frozen=True)
class SplitRun:
    """What a `SplitStrategy` needs at run time beside Flower's own arguments.

    Parameters
    ----------
    coordinator : Coordinator
        Runs plans on the devices.
    scene : callable
        ``scene(server_round, samples)`` gives the situation to plan for.
    on_round : callable
        Called after each round (and with round 0 for the initial evaluation) with what came out
        and the global adapters.
    first_round : int
        The round to begin with; above 1 when a run is resumed.
    evaluate_every : int
        Evaluate on the devices after every so many rounds, and always after the last.
    quorum : int
        The run stops if fewer branches of a round survive.
    """

    coordinator: Coordinator
    scene: Callable[[int, dict[int, int]], Scene]
    on_round: Callable[[RoundOutcome, ArrayRecord, MetricRecord | None], None]
    first_round: int = 1
    evaluate_every: int = 1
    quorum: int = 1


class SplitStrategy(Strategy):
    """A Flower strategy whose devices train only the first blocks of a model.

    The wrapped strategy samples devices and aggregates, as it would for devices that train whole
    models: it receives one complete adapter set per branch. A scheme overrides `plan_round`.

    Parameters
    ----------
    inner : Strategy, optional
        The Flower strategy to wrap; FedAvg over all devices by default.

    Examples
    --------
    >>> class MyScheme(SplitStrategy):
    ...     def plan_round(self, scene):
    ...         route = Route.two_tier(scene.n_blocks, cut=2)
    ...         return RoundPlan.parallel(scene.turn(device, route) for device in scene.devices)
    """

    def __init__(self, inner: Strategy | None = None) -> None:
        self.inner = inner if inner is not None else FedAvg()
        self._run: SplitRun | None = None

    @abstractmethod
    def plan_round(self, scene: Scene) -> RoundPlan:
        """Decide a round: branches, the order of devices in them, cuts, codec, shares.

        Parameters
        ----------
        scene : Scene
            Who takes part, the model, the channel and the fleet.

        Returns
        -------
        RoundPlan
            The plan that is then trained and costed. Must depend on `scene` alone.
        """

    def plan_evaluation(self, scene: Scene) -> tuple[Turn, ...]:
        """Decide over which route each device evaluates: by default, the one it would train on.

        Devices that would not train take the route of the first, over their own edge.
        """
        plan = self.plan_round(scene)
        every = [turn for branch in plan.branches for turn in branch.turns if turn.repeat == 0]
        by_device = {turn.device: turn for turn in every}
        fallback = plan.branches[0].turns[0].route

        def spare(device: int) -> Turn:
            turn = scene.turn(device, fallback)
            on_edge = len(fallback.on(EDGE)) > 0
            return replace(turn, edge=int(scene.fleet.home[device])) if on_edge else turn

        return tuple(by_device.get(device) or spare(device) for device in scene.devices)

    def branch_weight(self, samples: Sequence[int]) -> int:
        """Say how much a branch counts in a weighted average of branches.

        Parameters
        ----------
        samples : sequence of int
            Training samples of each device that finished a turn in the branch.

        Returns
        -------
        int
            By default all of its samples.
        """
        return sum(samples)

    def bind(self, run: SplitRun) -> None:
        """Give the strategy its run; `start` needs it."""
        self._run = run

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy choose this round's devices."""
        # Flower's strategies sample with the global generators.
        _seed_globals(self._bound().coordinator.job.seed, "sample", server_round)
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the wrapped strategy aggregate one complete reply per branch, in branch order."""
        _seed_globals(self._bound().coordinator.job.seed, "aggregate", server_round)
        return self.inner.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy choose the devices that evaluate."""
        _seed_globals(self._bound().coordinator.job.seed, "sample-evaluate", server_round)
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Let the wrapped strategy aggregate what the devices measured."""
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the scheme and the wrapped strategy."""
        log(INFO, "\t├──> Scheme: %s over %s", type(self).__name__, type(self.inner).__name__)
        self.inner.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds, as `Strategy.start` does, with split turns in place of messages.

        `timeout` is not used: the coordinator's deadline holds for each turn. Raises
        `FedsplitError` if `bind` was not called, or if fewer branches of a round
        survive than its quorum.
        """
        run = self._bound()
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        log(INFO, "Starting %s for %s rounds", type(self).__name__, num_rounds)
        self.summary()
        result = Result(arrays=initial_arrays)
        arrays = initial_arrays
        if run.first_round == 1:
            self._evaluate(0, arrays, evaluate_config, grid, result, evaluate_fn)
        for server_round in range(run.first_round, num_rounds + 1):
            log(INFO, "[ROUND %s/%s]", server_round, num_rounds)
            outcome, arrays, metrics = self._train(server_round, arrays, train_config, grid)
            result.arrays = arrays
            if metrics is not None:
                result.train_metrics_clientapp[server_round] = metrics
            if server_round % run.evaluate_every == 0 or server_round == num_rounds:
                self._evaluate(
                    server_round, arrays, evaluate_config, grid, result, evaluate_fn, outcome
                )
            else:
                run.on_round(outcome, arrays, None)
        return result

    def _train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> tuple[RoundOutcome, ArrayRecord, MetricRecord | None]:
        run = self._bound()
        started = time.monotonic()
        run.coordinator.welcome_back()
        devices = DeviceGrid(grid, run.coordinator.roster)
        messages = list(self.configure_train(server_round, arrays, config, devices))
        plan = self.plan_round(run.scene(server_round, self._samples(messages)))
        branches, failures = run.coordinator.train(
            server_round, plan.branches, dict(arrays.to_torch_state_dict())
        )
        by_node = {message.metadata.dst_node_id: message for message in messages}
        replies = [self._reply(outcome, by_node) for outcome in branches]
        survivors = sum(outcome.survived for outcome in branches)
        if survivors < min(run.quorum, len(branches)):
            reasons = "; ".join(f"{failure.who}: {failure.reason}" for failure in failures)
            count = f"{survivors} of {len(branches)} branches" if survivors else "no device"
            raise FedsplitError(f"round {server_round}: {count} finished ({reasons})")
        aggregated, metrics = self.aggregate_train(server_round, replies)
        if aggregated is None:
            log(WARNING, "round %s: nothing aggregated, adapters stay", server_round)
            aggregated = arrays
        _refuse_non_finite(aggregated, server_round)
        wall_s = time.monotonic() - started
        outcome = RoundOutcome(server_round, plan, branches, wall_s, failures=failures)
        log(INFO, "\t└──> train loss %s", mean_loss(outcome.turns))
        return outcome, aggregated, metrics

    def _evaluate(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        result: Result,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
        outcome: RoundOutcome | None = None,
    ) -> None:
        run = self._bound()
        started = time.monotonic()
        devices = DeviceGrid(grid, run.coordinator.roster)
        messages = list(self.configure_evaluate(server_round, arrays, config, devices))
        if not messages and outcome is None:
            return
        by_node = {message.metadata.dst_node_id: message for message in messages}
        scene = run.scene(max(server_round, 1), self._samples(messages))
        turns = self.plan_evaluation(scene) if messages else ()
        done, failures = run.coordinator.evaluate(
            server_round, turns, dict(arrays.to_torch_state_dict())
        )
        metrics = self.aggregate_evaluate(
            server_round,
            [
                _metrics_reply((turn,), turn.n_targets, by_node[self._node(turn.turn.device)])
                for turn in done
                if turn.n_targets > 0
            ],
        )
        if metrics is not None:
            log(INFO, "\t└──> evaluation %s", dict(metrics))
            result.evaluate_metrics_clientapp[server_round] = metrics
        if evaluate_fn is not None and (measured := evaluate_fn(server_round, arrays)) is not None:
            result.evaluate_metrics_serverapp[server_round] = measured
        trained = outcome or RoundOutcome(0, RoundPlan.parallel(turns), (), wall_s=0.0)
        run.on_round(
            RoundOutcome(
                server_round,
                trained.plan,
                trained.branches,
                trained.wall_s + time.monotonic() - started,
                done,
                trained.failures + failures,
            ),
            arrays,
            metrics,
        )

    def _samples(self, messages: list[Message]) -> dict[int, int]:
        roster = self._bound().coordinator.roster
        nodes = [roster.by_node(message.metadata.dst_node_id) for message in messages]
        return {node.index: node.n_train for node in sorted(nodes, key=lambda node: node.index)}

    def _node(self, device: int) -> int:
        return self._bound().coordinator.roster.by_index(device).node_id

    def _reply(self, outcome: BranchOutcome, messages: dict[int, Message]) -> Message:
        """Return the complete reply of a branch, as its first device would have sent it."""
        message = messages[self._node(outcome.branch.turns[0].device)]
        if not outcome.survived:
            reason = "; ".join(failure.reason for failure in outcome.failures)
            return Message(Error(_NO_SURVIVOR, reason), reply_to=message)
        roster = self._bound().coordinator.roster
        devices = dict.fromkeys(turn.turn.device for turn in outcome.turns)
        weight = self.branch_weight([roster.by_index(device).n_train for device in devices])
        reply = _metrics_reply(outcome.turns, weight, message)
        reply.content["arrays"] = to_record(outcome.adapters)
        return reply

    def _bound(self) -> SplitRun:
        if self._run is None:
            raise FedsplitError("SplitStrategy: bind() must be called before start()")
        return self._run


def _metrics_reply(turns: tuple[TurnOutcome, ...], weight: int, message: Message) -> Message:
    metrics = MetricRecord({"num-examples": weight, "loss": mean_loss(turns) or 0.0})
    if (right := accuracy(turns)) is not None:
        metrics["accuracy"] = right
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _seed_globals(seed: int, *names: str | int) -> None:
    derived = derive_seed(seed, *names) % 2**32
    random.seed(derived)
    np.random.seed(derived)  # noqa: NPY002 - what Flower's strategies draw from


def _refuse_non_finite(arrays: ArrayRecord, server_round: int) -> None:
    for name, array in arrays.items():
        values = array.numpy()
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            raise FedsplitError(f"round {server_round}: {name} is not finite after aggregation")
