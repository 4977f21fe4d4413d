"""The Flower ServerApp: composes the configuration, runs a scheme, reports."""

import json
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from logging import ERROR, INFO, WARNING
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import log
from omegaconf import DictConfig
from torch import Tensor

from fedsplit.data import describe
from fedsplit.errors import FedsplitError
from fedsplit.fleet import Timeline, measured_fleet, write_chrome_trace
from fedsplit.flower import (
    RoundOutcome,
    RunEnds,
    RunListener,
    SplitOptions,
    SplitStrategy,
    StageHost,
)
from fedsplit.flower.messages import to_record
from fedsplit.flower.server.checkpoint import (
    Checkpoint,
    load_checkpoint,
    restore_strategy,
    save_checkpoint,
    strategy_state,
)
from fedsplit.flower.server.outcome import evaluated_nowhere
from fedsplit.flower.server.roster import Roster
from fedsplit.flower.source import source_hash
from fedsplit.mapping import call
from fedsplit.models import SplitModel
from fedsplit.plan import Failure, RoundPlan
from fedsplit.report import RoundRecord, RunReport
from fedsplit.report.best import why_stop
from fedsplit.report.card import write_card
from fedsplit.report.export import save_trained
from fedsplit.report.files import needed, spared
from fedsplit.report.lock import locked
from fedsplit.report.trackers import Tracker, open_tracker
from fedsplit.schemes import Scene, Scheme, find_scheme

from .aggregator import build_aggregator
from .config import data_spec, job, link_settings, load_config, output_folder, plain, run_settings
from .keeper import Keeper
from .outputs import evaluate_settings, keep_settings, stop_settings, tracker
from .own_tests import OwnTests
from .plan_report import round_row
from .records import phases, record_of, sent_bytes, turn_rows
from .scenario import build_system, check_first_round
from .spending import Spending

app = ServerApp()
PROGRESS, ERROR_FILE, TRACE = "progress.json", "error.txt", "modelled_trace.json"


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the job that the run configuration describes."""
    config = load_config(shlex.split(str(context.run_config.get("hydra", ""))))
    folder = output_folder(config, str(context.run_config.get("output", "")))
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        run_job(grid, config, folder)


def run_job(grid: Grid, config: DictConfig, folder: Path) -> None:
    """Run a job over `grid`, whose nodes are its devices, and write into `folder`, which exists."""
    try:
        Run(config, folder).execute(grid)
    except Exception as error:
        # The command line shows this; Flower itself exits 0 when a ServerApp raises.
        cause = str(error) if isinstance(error, FedsplitError) else f"{error!r}"
        with suppress(OSError):
            (folder / ERROR_FILE).write_text(cause)
        log(ERROR, "run failed: %s", cause)
        raise


def build_scheme(config: DictConfig) -> Scheme:
    """Return the configured scheme."""
    settings = plain(config.strategy)
    name = str(settings.pop("name"))
    return call(find_scheme(name), settings, "strategy")


class Run(RunListener):
    """One run: its parts, built from the configuration, and what happens after each round."""

    def __init__(self, config: DictConfig, folder: Path) -> None:
        self._folder = folder
        self._settings = run_settings(config)
        self._job = job(config, source_hash())
        self._link = link_settings(config)
        self._system = build_system(config)
        self._scheme = build_scheme(config)
        self._line: Timeline | None = None
        self._sites: dict[int, str] = {}
        self._spent_j = np.zeros(self._system.fleet.n_devices)
        self._seq_len = data_spec(config).seq_len
        self._aggregator = build_aggregator(plain(config.aggregator))
        self._evaluation, self._keep = evaluate_settings(config), keep_settings(config)
        self._stop, self._tracker_name = stop_settings(config), tracker(config)
        self._config = plain(config)
        self._tracker: Tracker | None = None
        self._own: OwnTests | None = None
        resumed = config.resume is not None
        self._checkpoint = load_checkpoint(folder) if resumed else None
        if self._checkpoint is not None:
            if len(self._checkpoint.spent_j) == len(self._spent_j):
                self._spent_j += self._checkpoint.spent_j
            self._report = RunReport.resume(
                folder,
                self._checkpoint.server_round,
                self._settings.rounds,
                config={**plain(config), "resume": None},
            )
        else:
            self._report = RunReport(folder, plain(config), self._settings.rounds)
        last = self._report.records[-1:]
        before = last[0].privacy if last else None
        self._spending = Spending(self._job.privacy, self._job.batch_size, before)

    def execute(self, grid: Grid) -> None:
        """Run all rounds and write what came out."""
        settings, job = self._settings, self._job
        torch.set_num_threads(settings.server_threads)
        check_first_round(self._scheme, self._system)
        between_machines = self._link.bind is not None
        ahead = settings.start_ahead
        done = self._checkpoint.server_round if self._checkpoint else 0
        if self._tracker_name is not None:
            self._tracker = open_tracker(self._tracker_name, self._folder, self._config)
        with StageHost(job, self._link) as host:
            self._own = own = OwnTests(self._evaluation, job, host.model)
            initial = adapters = host.initial_adapters()
            self._keeper = Keeper(
                self._folder, self._keep, self._evaluation.best_by, host.model, initial
            )
            strategy = SplitStrategy(
                self._scheme,
                self._aggregator,
                job=job,
                scene=self._scene,
                host=host,
                options=SplitOptions(
                    n_edges=self._system.fleet.n_edges if settings.edge_nodes else 0,
                    places=None if between_machines else settings.concurrency,
                    start_ahead=between_machines if ahead is None else ahead,
                    first_round=done + 1,
                    evaluate_every=settings.evaluate_every,
                    quorum=settings.quorum,
                    max_update_norm=settings.max_update_norm,
                    link=self._link,
                ),
                listener=self,
            )
            if self._checkpoint is not None:
                adapters = self._checkpoint.adapters
                restore_strategy(self._aggregator, self._checkpoint.strategy)
            result = strategy.start(
                grid, to_record(adapters), num_rounds=settings.rounds, evaluate_fn=own.central
            )
            self._finish(result.arrays, initial, host.model)
            ended = strategy.ended
            self._report.finish(None if ended is None else {"stopped": ended})
            log(INFO, "results in %s", self._folder)

    def _scene(self, server_round: int, samples: Mapping[int, int]) -> Scene:
        return replace(self._system.scene(server_round, samples), spent_j=self._spent_j)

    def on_progress(self, phase: str, done: int, planned: int) -> None:
        """Say how far the round is."""
        progress = {"phase": phase, "steps": done, "planned": planned, "time": time.time()}
        # Progress is for the eye: a full disk must not end the run for it.
        with suppress(OSError):
            (self._folder / PROGRESS).write_text(json.dumps(progress))

    def on_nodes(self, roster: Roster) -> None:
        """Write down what the devices' data are, and model them as they were measured."""
        self._sites = {node.index: node.site for node in roster.nodes}
        by_index = sorted(roster.nodes, key=lambda node: node.index)
        self._spending.know([node.n_train for node in by_index])
        system = self._system
        fleet = measured_fleet(system.fleet, system.profile, roster.profiles)
        self._system = replace(system, fleet=fleet)
        counts = {node.index: node.counts for node in roster.nodes if node.counts is not None}
        left_out = list(dict.fromkeys(file for node in roster.nodes for file in node.left_out))
        lines = describe(counts, self._seq_len, left_out)
        by_device = {str(index): held.flat() for index, held in counts.items()}
        self._report.add_data(lines, by_device, left_out)

    def on_plan(self, server_round: int, plan: RoundPlan) -> None:
        """End the run before a round that would overspend its privacy budget."""
        try:
            self._spending.plan(plan)
        except RunEnds as reason:
            self._why_stopped = str(reason)
            raise

    def on_failure(self, failure: Failure) -> None:
        """Write it down at once."""
        self._report.add_failure(failure)

    def on_round(
        self, outcome: RoundOutcome, arrays: ArrayRecord, metrics: MetricRecord | None
    ) -> None:
        """Write down what came of it, and a checkpoint."""
        self._spending.evaluated(outcome)
        record = record_of(outcome, self._job.model.task, self._evaluation.metrics)
        number, adapters, own = outcome.server_round, dict(arrays.to_torch_state_dict()), self._own
        assert own is not None
        central, written = own.measured.get(number), own.written(number, adapters)
        record = replace(record, central=central, written=written, privacy=self._spending.record())
        if outcome.server_round > 0:
            record = replace(record, modelled=self._modelled(outcome))
        rows = turn_rows(outcome, self._sites, self._line if number > 0 else None)
        record = replace(record, phases=phases(rows))
        # In this order: a run goes on from the round of its checkpoint, whose record must be there.
        self._report.add_round(record, rows)
        self._tell(record)
        if evaluated_nowhere(outcome):
            log(WARNING, "round %s: no device could evaluate it, no checkpoint", record.round)
        elif outcome.server_round > 0:
            self._keeper.keep(self._report.records, adapters)
            state = strategy_state(self._aggregator)
            spent_j = tuple(self._spent_j.tolist())
            save_checkpoint(self._folder, Checkpoint(number, adapters, state, spent_j))
            self._keeper.clear(self._report.records)
        stop, by = self._stop, self._evaluation.best_by
        enough = why_stop(self._report.records, by, stop.patience, stop.min_delta)
        if enough is not None:
            raise RunEnds(enough)

    def _tell(self, record: RoundRecord) -> None:
        """Tell the tracker; that it cannot be reached must not end a run."""
        if self._tracker is None:
            return
        numbers = {
            name: float(value)
            for name, value in record.flat().items()
            if name != "round" and isinstance(value, int | float)
        }
        try:
            self._tracker.log(numbers, record.round)
        except Exception as error:  # whatever the tracker's library raises
            log(WARNING, "round %s: %s was not told (%s)", record.round, self._tracker_name, error)

    def _modelled(self, outcome: RoundOutcome) -> dict[str, float]:
        """Return what the round costs on the modelled system, with the bytes really sent."""
        plan, system = outcome.plan, self._system
        line = system.timeline(plan, outcome.server_round, sent_bytes(outcome))
        self._line = line
        self._spent_j = self._spent_j + line.cost.device_energy_j
        row = asdict(round_row(outcome.server_round, plan, line.cost, system.fleet))
        del row["round"]
        energy_j = row["device_energy_j"] + row["server_energy_j"]
        return {"delay_s": row.pop("delay_s"), "energy_j": energy_j, **row}

    def _finish(
        self, arrays: ArrayRecord, initial: Mapping[str, Tensor], model: SplitModel
    ) -> None:
        if self._line is not None:
            with spared(self._folder / TRACE):
                write_chrome_trace(self._line, self._folder / TRACE)
        name = "adapter" if self._job.model.train == "lora" else "model"
        trained = dict(arrays.to_torch_state_dict())
        with needed(self._folder):
            save_trained(self._folder / name, trained, model, initial)
            write_card(self._folder / name, self._config, self._report.records)
        (self._folder / PROGRESS).unlink(missing_ok=True)
        if self._tracker is not None:
            self._tracker.close()
