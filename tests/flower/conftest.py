"""Whole rounds in one process: the real strategy, device sessions, stages and sockets."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fedsplit.apps.client_app import app as client_app
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor

from fedsplit.data import DataSpec
from fedsplit.execution import OptimizerSpec
from fedsplit.fleet import FleetSpec, build_fleet
from fedsplit.flower import (
    Coordinator,
    Job,
    LocalWork,
    RoundOutcome,
    Scene,
    SplitRun,
    SplitStrategy,
    StageHost,
    discover,
)
from fedsplit.flower.messages import to_record
from fedsplit.flower.source import source_hash
from fedsplit.models import ModelSpec
from fedsplit.models.profile import profile_model
from fedsplit.plan import Failure
from fedsplit.wireless import Channel, ChannelSpec
from tests.flower.federation import N_EDGES, ThreadGrid

N_DEVICES = 4


class Federation:
    """Runs schemes on a tiny model over four devices; every run starts afresh."""

    def __init__(self, model: ModelSpec, data: DataSpec) -> None:
        self.job = Job(
            model=model,
            data=data,
            optimizer=OptimizerSpec(name="adamw", lr=3e-3),
            n_devices=N_DEVICES,
            batch_size=2,
            seed=7,
            source=source_hash(),
            connect_s=5,
        )
        self.profile = profile_model(model, data.seq_len)
        self.fleet = build_fleet(FleetSpec(devices=N_DEVICES, edges=2))
        devices = self.fleet.devices
        self.channel = Channel(
            ChannelSpec(), devices.positions_m, self.fleet.stations_m, 7, self.fleet.home
        )

    def run(
        self,
        strategy: SplitStrategy,
        *,
        rounds: int = 1,
        steps: int = 2,
        concurrency: int = 4,
        disturb: Callable[[Message, int], None] | None = None,
        deadline_s: float = 60.0,
        adapters: dict[str, Tensor] | None = None,
        first_round: int = 1,
        edge_folder: Path | None = None,
        places: int | None = None,
        on_failure: Callable[[Failure], None] = lambda failure: None,
        start_ahead: bool = False,
        quorum: int = 1,
    ) -> tuple[dict[str, Tensor], list[RoundOutcome]]:
        """Return the final adapters and what came out of each round (round 0 first)."""
        outcomes: list[RoundOutcome] = []
        grid = ThreadGrid(client_app, N_DEVICES, concurrency, disturb, edge_folder)
        with StageHost(self.job.model, self.job.optimizer, "cpu") as host:
            n_edges = N_EDGES if edge_folder is not None else 0
            roster = discover(grid, self.job, 30, n_edges)
            coordinator = Coordinator(
                grid,
                host,
                self.job,
                roster,
                deadline_s,
                places=places,
                on_failure=on_failure,
                start_ahead=start_ahead,
            )

            def scene(server_round: int, samples: dict[int, int]) -> Scene:
                work = LocalWork(batch_size=self.job.batch_size, steps=steps)
                state = self.channel.realise(server_round)
                return Scene(
                    server_round,
                    samples,
                    work,
                    self.profile,
                    self.fleet,
                    state,
                    self.channel.mean,
                    seed=self.job.seed,
                )

            def keep(outcome: RoundOutcome, _: ArrayRecord, __: MetricRecord | None) -> None:
                outcomes.append(outcome)

            strategy.bind(SplitRun(coordinator, scene, keep, first_round, quorum=quorum))
            start = host.initial_adapters() if adapters is None else adapters
            result = strategy.start(grid, to_record(start), num_rounds=rounds)
        return dict(result.arrays.to_torch_state_dict()), outcomes


@pytest.fixture(scope="session")
def federation(tiny_checkpoint: Path, tiny_text: Path) -> Federation:
    """Return a federation of four devices with different data."""
    return Federation(
        ModelSpec(source=str(tiny_checkpoint), r=2, target_modules="all-linear"),
        DataSpec(source="text", path=str(tiny_text), seq_len=16, min_samples=4),
    )


@pytest.fixture
def fedavg() -> Strategy:
    """Return FedAvg over whoever is there."""
    return FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
