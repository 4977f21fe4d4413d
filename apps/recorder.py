"""What is written down of a run while it goes on, and when it ends it."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from logging import WARNING
from pathlib import Path

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from omegaconf import DictConfig
from torch import Tensor

from fedsplit.data import describe
from fedsplit.flower import Job, RoundOutcome, RunEnds, RunListener
from fedsplit.flower.server.checkpoint import Checkpoint, save_checkpoint, strategy_state
from fedsplit.flower.server.outcome import evaluated_nowhere
from fedsplit.flower.server.roster import Roster
from fedsplit.flower.server.standing import Standing
from fedsplit.models import SplitModel
from fedsplit.plan import Failure, RoundPlan
from fedsplit.report import RoundRecord, RunReport
from fedsplit.report.best import why_stop
from fedsplit.report.card import write_card
from fedsplit.report.export import save_trained
from fedsplit.report.files import needed
from fedsplit.report.trackers import open_tracker

from .config import data_spec
from .keeper import Keeper
from .modelled import ModelledRun
from .outputs import evaluate_settings, keep_settings, stop_settings, tracker
from .own_tests import OwnTests
from .records import phases, record_of, turn_rows
from .scenario import require_frozen
from .spending import Spending
from .values import plain

PROGRESS = "progress.json"


class Recorder(RunListener):
    """Writes records, checkpoints and kept adapters; ends a run that is to go no further.

    Parameters
    ----------
    config : DictConfig
        The run's.
    folder : Path
        Its output.
    work : Job
        Its job.
    aggregator : Strategy
        The wrapped Flower strategy, whose state is kept.
    modelled : ModelledRun
        Says what rounds cost.
    report : RunReport
        Takes the records; it may hold those of rounds before.
    model : SplitModel
        The whole model.
    initial : mapping of str to Tensor
        The adapters that the run began with.
    """

    def __init__(
        self,
        config: DictConfig,
        folder: Path,
        *,
        work: Job,
        aggregator: Strategy,
        modelled: ModelledRun,
        report: RunReport,
        model: SplitModel,
        initial: Mapping[str, Tensor],
    ) -> None:
        self._folder = folder
        self._work = work
        self._aggregator = aggregator
        self._modelled = modelled
        self._report = report
        self._model = model
        self._initial = initial
        self._settings, self._config = config, plain(config)
        self._evaluation, self._stop = evaluate_settings(config), stop_settings(config)
        self._seq_len = data_spec(config).seq_len
        self._sites: dict[int, str] = {}
        self._own = OwnTests(self._evaluation, work, model)
        self._keeper = Keeper(
            folder, keep_settings(config), self._evaluation.best_by, model, initial
        )
        last = report.records[-1:]
        self._spending = Spending(work.privacy, work.batch_size, last[0].privacy if last else None)
        self._tracker_name = tracker(config)
        name = self._tracker_name
        self._tracker = None if name is None else open_tracker(name, folder, self._config)

    def central(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate on the server's own test set, as Flower's strategies have it done."""
        return self._own.central(server_round, arrays)

    def on_progress(self, phase: str, done: int, planned: int) -> None:
        """Say how far the round is."""
        progress = {"phase": phase, "steps": done, "planned": planned, "time": time.time()}
        # Progress is for the eye: a full disk must not end the run for it.
        with suppress(OSError):
            (self._folder / PROGRESS).write_text(json.dumps(progress))

    def on_nodes(self, roster: Roster) -> None:
        """Write down what the devices' data are, and model them as they were measured."""
        self._modelled.know(roster)
        self._sites = {node.index: node.site for node in roster.nodes}
        by_index = sorted(roster.nodes, key=lambda node: node.index)
        self._spending.know([node.n_train for node in by_index])
        counts = {node.index: node.counts for node in roster.nodes if node.counts is not None}
        left_out = list(dict.fromkeys(file for node in roster.nodes for file in node.left_out))
        lines = describe(counts, self._seq_len, left_out)
        by_device = {str(index): held.flat() for index, held in counts.items()}
        self._report.add_data(lines, by_device, left_out)

    def on_plan(self, server_round: int, plan: RoundPlan) -> None:
        """End the run before a round that would overspend its privacy budget.

        Raises
        ------
        SettingsError
            If devices of this round only infer, and a setting does not go with that.
        """
        require_frozen(self._settings, plan)
        self._spending.plan(plan)

    def on_failure(self, failure: Failure) -> None:
        """Write it down at once."""
        self._report.add_failure(failure)

    def on_round(
        self, outcome: RoundOutcome, arrays: ArrayRecord, metrics: MetricRecord | None
    ) -> None:
        """Write down what came of it, and a checkpoint."""
        number, adapters = outcome.server_round, dict(arrays.to_torch_state_dict())
        self._spending.evaluated(outcome)
        record = replace(
            record_of(outcome, self._work.model.task, self._evaluation.metrics),
            central=self._own.measured.get(number),
            written=self._own.written(number, adapters),
            privacy=self._spending.record(),
            modelled=self._modelled.costs(outcome) if number > 0 else None,
        )
        rows = turn_rows(outcome, self._sites, self._modelled.line if number > 0 else None)
        # In this order: a run goes on from the round of its checkpoint, whose record must be there.
        self._report.add_round(replace(record, phases=phases(rows)), rows)
        self._tell(record)
        if evaluated_nowhere(outcome):
            log(WARNING, "round %s: no device could evaluate it, no checkpoint", number)
        elif number > 0:
            self._keeper.keep(self._report.records, adapters)
            state = strategy_state(self._aggregator)
            spent_j, standing = self._modelled.spent_j, outcome.standing or Standing()
            checkpoint = Checkpoint(number, adapters, state, spent_j, standing)
            save_checkpoint(self._folder, checkpoint)
            self._keeper.clear(self._report.records)
        stop, by = self._stop, self._evaluation.best_by
        enough = why_stop(self._report.records, by, stop.patience, stop.min_delta)
        if enough is not None:
            raise RunEnds(enough)

    def finish(self, arrays: ArrayRecord, ended: str | None) -> None:
        """Write what was trained, and that the run is complete or why it `ended` before."""
        self._modelled.write_trace(self._folder)
        name = "adapter" if self._work.model.train == "lora" else "model"
        trained = dict(arrays.to_torch_state_dict())
        if self._work.model.bottleneck is None:  # else no other program could load it
            with needed(self._folder):
                save_trained(self._folder / name, trained, self._model, self._initial)
                write_card(self._folder / name, self._config, self._report.records)
        (self._folder / PROGRESS).unlink(missing_ok=True)
        if self._tracker is not None:
            self._tracker.close()
        self._report.finish(None if ended is None else {"stopped": ended})

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
