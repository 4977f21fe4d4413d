"""Whole rounds in one process: the real strategy, devices, stages and sockets."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor

from fedsplit.data import DataSpec
from fedsplit.execution import OptimizerSpec
from fedsplit.fleet import FleetSpec
from fedsplit.flower import Job, RoundOutcome, RunListener, SplitOptions, SplitStrategy, client_app
from fedsplit.flower.messages import to_record
from fedsplit.flower.server.standing import Standing
from fedsplit.flower.source import source_hash
from fedsplit.flower.system import System, make_system
from fedsplit.models import ModelSpec
from fedsplit.patience import Patience
from fedsplit.plan import Failure, RoundPlan
from fedsplit.schemes import LocalWork, Scene, Scheme
from fedsplit.testing.grid import N_EDGES, ThreadGrid, WatchingGrid

N_DEVICES = 4


class Federation:
    """Runs schemes on a small model over four devices; every run starts afresh.

    Parameters
    ----------
    model : ModelSpec
        What to fine-tune.
    data : DataSpec
        What the devices hold.
    """

    def __init__(self, model: ModelSpec, data: DataSpec) -> None:
        self.job = Job(
            model=model,
            data=data,
            optimizer=OptimizerSpec(name="adamw", lr=3e-3),
            n_devices=N_DEVICES,
            batch_size=2,
            seed=7,
            source=source_hash(),
            patience=Patience(connect_s=30, deadline_s=60),
        )
        self.system: System = make_system(
            model,
            fleet=FleetSpec(devices=N_DEVICES, edges=2),
            work=LocalWork(batch_size=2),
            seq_len=data.seq_len,
            seed=7,
        )
        self.app = client_app()

    def scene(self, server_round: int, samples: Mapping[int, int], **work: Any) -> Scene:
        """Return the situation of a round with turns of two mini-batches, or other `LocalWork`."""
        done = LocalWork(batch_size=self.job.batch_size, **{"steps": 2, **work})
        return replace(self.system, work=done).scene(server_round, samples)

    def run(
        self,
        scheme: Scheme,
        inner: Strategy | None = None,
        *,
        rounds: int = 1,
        steps: int | None = 2,
        concurrency: int = 4,
        disturb: Callable[[Message, int], None] | None = None,
        patience: Patience | None = None,
        adapters: dict[str, Tensor] | None = None,
        edge_folder: Path | None = None,
        on_failure: Callable[[Failure], None] = lambda failure: None,
        on_plan: Callable[[int, RoundPlan], None] = lambda server_round, plan: None,
        app: ClientApp | None = None,
        standing: Standing | None = None,
        watched: bool = False,
        **options: Any,
    ) -> tuple[dict[str, Tensor], list[RoundOutcome]]:
        """Return the final adapters and what came out of each round (round 0 first).

        Parameters
        ----------
        scheme : Scheme
            Plans the rounds.
        inner : Strategy, optional
            Aggregates; FedAvg over whoever is there by default.
        rounds, steps : int
            Rounds, and mini-batches in a turn.
        concurrency : int
            Devices that work at once.
        disturb : callable, optional
            Called with each message and its device before that sees it; may sleep or raise.
        patience : Patience, optional
            In place of the job's.
        adapters : mapping of str to Tensor, optional
            To start from.
        edge_folder : Path, optional
            If given, edges are nodes with their sockets in it.
        on_failure : callable, optional
            Called with each failure.
        on_plan : callable, optional
            Called with the plan of each round before it is trained.
        app : ClientApp, optional
            What the nodes run, in place of fedsplit's own.
        standing : Standing, optional
            What rounds before left, where a run goes on.
        watched : bool
            Whether the grid sees when a device begins, which then shows no presence.
        **options
            Of `fedsplit.flower.SplitOptions`.
        """
        outcomes: list[RoundOutcome] = []

        class Keep(RunListener):
            def on_round(
                self, outcome: RoundOutcome, arrays: ArrayRecord, metrics: MetricRecord | None
            ) -> None:
                outcomes.append(outcome)

            def on_plan(self, server_round: int, plan: RoundPlan) -> None:
                on_plan(server_round, plan)

            def on_failure(self, failure: Failure) -> None:
                on_failure(failure)

        job = self.job if patience is None else replace(self.job, patience=patience)
        nodes = N_EDGES if edge_folder is not None else 0
        done = SplitOptions(n_edges=nodes, **options)
        strategy = SplitStrategy(
            scheme,
            inner or FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1),
            job=job,
            scene=lambda server_round, samples: self.scene(
                server_round, samples, steps=steps, averaged=done.aggregation
            ),
            options=done,
            listener=Keep(),
        )
        strategy.standing = standing or strategy.standing
        kind = WatchingGrid if watched else ThreadGrid
        grid = kind(app or self.app, N_DEVICES, concurrency, disturb, edge_folder)
        start = None if adapters is None else to_record(adapters)
        result = strategy.start(grid, start, num_rounds=rounds)
        return dict(result.arrays.to_torch_state_dict()), outcomes
