"""Split training under any Flower strategy."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from logging import INFO, WARNING

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from flwr.supercore import log
from torch import Tensor

from fedsplit.errors import FedsplitError, require
from fedsplit.execution import OptimizerSpec
from fedsplit.execution.aggregate import FFA, MEAN, aggregation_error
from fedsplit.fleet import FleetSpec, measured_fleet
from fedsplit.flower.instructions import (
    clipped,
    devices_needed,
    read_instructions,
    require_takes_late,
    require_takes_one,
)
from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.messages import to_record
from fedsplit.flower.options import RunEnds, RunListener, SplitOptions
from fedsplit.flower.replies import metrics_reply, refuse_non_finite, seed_globals
from fedsplit.flower.server.coordinator import Coordinator
from fedsplit.flower.server.device_grid import DeviceGrid
from fedsplit.flower.server.host import StageHost
from fedsplit.flower.server.outcome import BranchOutcome, RoundOutcome, mean_loss
from fedsplit.flower.server.roster import Roster, discover
from fedsplit.flower.server.standing import Contribution, Standing, merged
from fedsplit.flower.source import source_hash
from fedsplit.flower.system import make_system
from fedsplit.flower.tasks import Job
from fedsplit.growth import require_room
from fedsplit.models.ranks import residual_rank
from fedsplit.plan import RoundPlan
from fedsplit.schemes import LocalWork, Scene, Scheme, planned_evaluation
from fedsplit.schemes.turnout import OutOfEnergy, turn_out

_NO_SURVIVOR = 1


class SplitStrategy(Strategy):
    """A Flower strategy whose devices train only a part of a model, the servers the rest.

    The wrapped strategy samples devices and aggregates, as it would for devices that train whole
    models: it receives one complete adapter set per branch.

    Parameters
    ----------
    scheme : Scheme
        Plans each round.
    inner : Strategy, optional
        The Flower strategy to wrap; FedAvg over all devices by default.
    job : Job
        The model and what else all nodes have to know.
    scene : callable, optional
        ``scene(server_round, samples)`` gives the situation to plan for; by default that of the
        default fleet and channel, with turns of one epoch.
    host : StageHost, optional
        The servers' side; one that lives as long as `start` by default.
    options : SplitOptions, optional
        How the run is carried out.
    listener : RunListener, optional
        Is told what comes out.

    Examples
    --------
    >>> job = Job(model=ModelSpec(source="gpt2"), n_devices=4)
    >>> SplitStrategy(SplitFed(cut=2), inner=FedAdam(), job=job).start(grid, num_rounds=3)
    """

    def __init__(
        self,
        scheme: Scheme,
        inner: Strategy | None = None,
        *,
        job: Job,
        scene: Callable[[int, Mapping[int, int]], Scene] | None = None,
        host: StageHost | None = None,
        options: SplitOptions | None = None,
        listener: RunListener | None = None,
    ) -> None:
        optimizer, at_nodes = job.optimizer, options is not None and options.n_edges > 0
        fits = not (optimizer.keep_state and at_nodes)
        require(fits, "train.keep_state", True, "false where edge servers are nodes, which forget")
        self.scheme = scheme
        self.inner = inner if inner is not None else FedAvg()
        # Nodes say which source they run, and must run this one.
        self._job = job if job.source else replace(job, source=source_hash())
        self._scene = scene
        self._host = host
        self._options = options or SplitOptions()
        how, model = self._options.aggregation, job.model
        require_takes_one(self.inner, how)
        require_takes_late(self.inner, self._options.waiting, how)
        fits = model.freeze_a or how != FFA
        require(fits, "aggregator.adapters", FFA, "with model.freeze_a=true")
        require_room(how, train=model.train, lora=model.lora, edge_nodes=at_nodes)
        self._listener = listener or RunListener()
        self._coordinator: Coordinator | None = None
        self.ended: str | None = None  # why, where a run ended before its last round
        self.standing = Standing()  # to be set where a run goes on

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy choose this round's devices."""
        # Flower's strategies sample with the global generators.
        seed_globals(self._job.seed, "sample", server_round)
        return self.inner.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the wrapped strategy aggregate one complete reply per branch, in branch order."""
        seed_globals(self._job.seed, "aggregate", server_round)
        return self.inner.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let the wrapped strategy choose the devices that evaluate."""
        seed_globals(self._job.seed, "sample-evaluate", server_round)
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Let the wrapped strategy aggregate what the devices measured."""
        return self.inner.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Log the scheme and the wrapped strategy."""
        names = type(self.scheme).__name__, type(self.inner).__name__
        log(INFO, "\t├──> Scheme: %s over %s", *names)
        self.inner.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds, as `Strategy.start` does, with split turns in place of messages.

        Without `initial_arrays` it begins with fresh adapters. `timeout` is not used: the job's
        patience holds for each turn.

        Raises
        ------
        FedsplitError
            If nodes are missing, a plan cannot be carried out, or fewer branches of a round
            survive than the quorum.
        """
        options = self._options
        with ExitStack() as stack:
            host = self._host or stack.enter_context(StageHost(self._job, options.link))
            if self._scene is None:
                fleet = FleetSpec(devices=self._job.n_devices, edges=options.n_edges)
                work = LocalWork(batch_size=self._job.batch_size, averaged=options.aggregation)
                self._scene = make_system(
                    self._job.model,
                    fleet=fleet,
                    work=work,
                    optimizer=self._job.optimizer,
                    seed=self._job.seed,
                ).scene
            # Nodes are given adapters; they need not have the folder that the run started from.
            job = replace(self._job, model=replace(self._job.model, adapter=None))
            link = options.link or LinkSettings()
            login_keys = link.login_keys(job.n_devices, options.n_edges)
            self._coordinator = Coordinator(
                grid,
                host,
                job=job,
                roster=discover(grid, job, options.n_edges, login_keys, options.places),
                places=options.places,
                start_ahead=options.start_ahead,
                max_update_norm=options.max_update_norm,
                aggregation=options.aggregation,
                login_keys=login_keys,
                listener=self._listener,
            )
            self._listener.on_nodes(self._coordinator.roster)
            arrays = initial_arrays or to_record(host.initial_adapters())
            train, evaluate = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
            return self._rounds(grid, arrays, num_rounds, train, evaluate, evaluate_fn)

    def _rounds(
        self,
        grid: Grid,
        arrays: ArrayRecord,
        num_rounds: int,
        train_config: ConfigRecord,
        evaluate_config: ConfigRecord,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None,
    ) -> Result:
        first, every = self._options.first_round, self._options.evaluate_every
        log(INFO, "Starting %s for %s rounds", type(self.scheme).__name__, num_rounds)
        self.summary()
        result = Result(arrays=arrays)
        try:
            if first == 1:
                self._evaluate(0, arrays, evaluate_config, grid, result, evaluate_fn)
            for server_round in range(first, num_rounds + 1):
                log(INFO, "[ROUND %s/%s]", server_round, num_rounds)
                optimizer = self._job.optimizer.within(server_round - 1, num_rounds)
                outcome, arrays, metrics = self._train(
                    server_round, arrays, train_config, grid, optimizer
                )
                result.arrays = arrays
                if metrics is not None:
                    result.train_metrics_clientapp[server_round] = metrics
                if server_round % every == 0 or server_round == num_rounds:
                    self._evaluate(
                        server_round, arrays, evaluate_config, grid, result, evaluate_fn, outcome
                    )
                else:
                    self._listener.on_round(outcome, arrays, None)
        except RunEnds as reason:
            self.ended = str(reason)
            log(INFO, "the run ends before its last round: %s", reason)
        return result

    def _train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
        optimizer: OptimizerSpec,
    ) -> tuple[RoundOutcome, ArrayRecord, MetricRecord | None]:
        coordinator, started = self._running(), time.monotonic()
        coordinator.welcome_back()
        self._require_enough(coordinator.roster)
        devices = DeviceGrid(grid, coordinator.roster, self.standing.absent)
        messages = list(self.configure_train(server_round, arrays, config, devices))
        told = read_instructions(messages)
        if told.proximal_mu:
            optimizer = replace(optimizer, proximal_mu=told.proximal_mu)
        base, standing = dict(arrays.to_torch_state_dict()), self.standing
        scene = self._situation(server_round, messages, base)
        try:
            turnout = turn_out(self.scheme, scene, self._options.waiting, standing.under_way)
        except OutOfEnergy as error:
            raise RunEnds(str(error)) from error
        plan = turnout.plan
        self._listener.on_plan(server_round, plan)
        branches, failures = coordinator.train(server_round, plan.branches, base, optimizer)
        trained = {
            one.index: Contribution.of(one, self.scheme, coordinator.roster)
            for one in branches
            if one.survived
        }
        arrived = standing.arrived(turnout, base)
        brought = [trained[place] for place in turnout.in_time if place in trained] + arrived
        due = len(turnout.in_time) + len(arrived)
        if len(brought) < min(self._options.quorum, due):
            reasons = "; ".join(f"{failure.who}: {failure.reason}" for failure in failures)
            count = f"{len(brought)} of {due} branches" if brought else "no device"
            raise FedsplitError(f"round {server_round}: {count} finished ({reasons})")
        by_node = {message.metadata.dst_node_id: message for message in messages}
        if self._options.aggregation == MEAN:
            lost = [branches[place] for place in turnout.in_time if place not in trained]
            replies = [self._error(outcome, by_node) for outcome in lost]
            replies += [self._reply(one, by_node, clips=told.clips) for one in brought]
        else:
            whole = merged(self._options.aggregation, brought)
            replies = [self._reply(whole, by_node, clips=False)]
        aggregated, metrics = self.aggregate_train(server_round, replies)
        if aggregated is None:
            log(WARNING, "round %s: nothing aggregated, adapters stay", server_round)
            aggregated = arrays
        # The mean of what is the same everywhere is off in its last digit.
        for name in coordinator.untrained(plan.branches):
            if all(base[name].equal(one.adapters[name]) for one in arrived):
                aggregated[name] = arrays[name]
        refuse_non_finite(aggregated, server_round)
        self.standing = standing.after(turnout, list(trained.values()), base)
        wall_s = time.monotonic() - started
        errors, parts = list(coordinator.errors), [one.part for one in brought]
        if len(parts) > 1 and aggregated.keys() >= parts[0].adapters.keys():
            errors.append(aggregation_error(parts, dict(aggregated.to_torch_state_dict())) or 0.0)
        outcome = RoundOutcome(
            server_round,
            plan,
            branches,
            wall_s,
            failures=failures,
            aggregation_error=max(errors, default=None),
            turnout=turnout,
            standing=self.standing,
        )
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
        coordinator, started = self._running(), time.monotonic()
        devices = DeviceGrid(grid, coordinator.roster)
        messages = list(self.configure_evaluate(server_round, arrays, config, devices))
        if not messages and outcome is None:
            return
        by_node = {message.metadata.dst_node_id: message for message in messages}
        adapters = dict(arrays.to_torch_state_dict())
        scene = self._situation(max(server_round, 1), messages, adapters)
        turns = planned_evaluation(self.scheme, scene) if messages else ()
        done, failures = coordinator.evaluate(server_round, turns, adapters)
        metrics = self.aggregate_evaluate(
            server_round,
            [
                metrics_reply((turn,), turn.n_targets, by_node[self._node(turn.turn.device)])
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
        wall_s = trained.wall_s + time.monotonic() - started
        failed = trained.failures + failures
        outcome = replace(
            trained, server_round=server_round, wall_s=wall_s, evaluation=done, failures=failed
        )
        self._listener.on_round(outcome, arrays, metrics)

    def _situation(
        self, server_round: int, messages: list[Message], adapters: Mapping[str, Tensor]
    ) -> Scene:
        """Return what to plan for: the devices that the wrapped strategy chose, by index.

        What nodes said about their data and their speed takes the place of what the fleet assumes.
        """
        roster = self._running().roster
        nodes = [roster.by_node(message.metadata.dst_node_id) for message in messages]
        by_index = sorted(nodes, key=lambda node: node.index)
        assert self._scene is not None
        scene = self._scene(server_round, {node.index: node.n_train for node in by_index})
        samples = scene.fleet.samples.copy()
        for node in roster.nodes:
            samples[node.index] = node.n_train
        fleet = measured_fleet(scene.fleet, scene.profile, roster.profiles)
        fleet = replace(fleet, samples=samples)
        return replace(scene, fleet=fleet, residual=residual_rank(adapters))

    def _node(self, device: int) -> int:
        return self._running().roster.by_index(device).node_id

    def _reply(
        self, brought: Contribution, messages: dict[int, Message], *, clips: bool
    ) -> Message:
        """Return the complete reply of a branch, as its first device would have sent it."""
        message = self._message(brought.devices[0], messages)
        reply = brought.reply(message)
        return clipped(message, reply, self.inner) if clips else reply

    def _error(self, outcome: BranchOutcome, messages: dict[int, Message]) -> Message:
        reason = "; ".join(failure.reason for failure in outcome.failures)
        message = self._message(outcome.branch.devices[0], messages)
        return Message(Error(_NO_SURVIVOR, reason), reply_to=message)

    def _message(self, device: int, messages: dict[int, Message]) -> Message:
        """Return what `device` was told in this round, or, if nothing, what the others were."""
        node = self._node(device)
        other = next(iter(messages.values()))
        kind = other.metadata.message_type
        return messages.get(node) or Message(other.content, dst_node_id=node, message_type=kind)

    def _require_enough(self, roster: Roster) -> None:
        """End the run if so few devices are left that the wrapped strategy would wait for ever."""
        needed, absent = max(devices_needed(self.inner), 1), self.standing.absent
        free = sum(node.index not in absent for node in roster.nodes)
        if absent and free < needed:
            raise RunEnds(f"{free} devices can begin a turn, the aggregator needs {needed}")

    def _running(self) -> Coordinator:
        if self._coordinator is None:
            raise FedsplitError("SplitStrategy: rounds need start(), which finds the nodes")
        return self._coordinator
