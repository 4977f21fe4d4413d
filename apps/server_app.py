"""The Flower ServerApp: composes the configuration, runs a scheme, reports."""

import shlex
from contextlib import suppress
from logging import ERROR, INFO
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import log
from omegaconf import DictConfig

from fedsplit.errors import FedsplitError
from fedsplit.flower import SplitOptions, SplitStrategy, StageHost
from fedsplit.flower.messages import to_record
from fedsplit.flower.server.checkpoint import load_checkpoint, restore_strategy
from fedsplit.flower.source import source_hash
from fedsplit.mapping import call
from fedsplit.report import RunReport
from fedsplit.report.lock import locked
from fedsplit.schemes import Scheme, find_scheme

from .aggregator import build_aggregator
from .config import job, load_config, output_folder
from .link_config import link_settings
from .modelled import ModelledRun
from .recorder import Recorder
from .run_settings import run_settings
from .scenario import build_system, check_first_round
from .values import plain
from .work import aggregation

app = ServerApp()
ERROR_FILE = "error.txt"


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
        _run(grid, config, folder)
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


def _run(grid: Grid, config: DictConfig, folder: Path) -> None:
    settings, link, work = run_settings(config), link_settings(config), job(config, source_hash())
    torch.set_num_threads(settings.server_threads)
    scheme, aggregator = build_scheme(config), build_aggregator(plain(config.aggregator))
    checkpoint = None if config.resume is None else load_checkpoint(folder)
    done = 0 if checkpoint is None else checkpoint.server_round
    modelled = ModelledRun(build_system(config), () if checkpoint is None else checkpoint.spent_j)
    check_first_round(scheme, modelled.system)
    if checkpoint is None:
        report = RunReport(folder, plain(config), settings.rounds)
    else:
        chosen = {**plain(config), "resume": None}
        report = RunReport.resume(folder, done, settings.rounds, config=chosen)
    between_machines, ahead = link.bind is not None, settings.start_ahead
    with StageHost(work, link) as host:
        initial = host.initial_adapters()
        recorder = Recorder(
            config,
            folder,
            work=work,
            aggregator=aggregator,
            modelled=modelled,
            report=report,
            model=host.model,
            initial=initial,
        )
        strategy = SplitStrategy(
            scheme,
            aggregator,
            job=work,
            scene=modelled.scene,
            host=host,
            options=SplitOptions(
                n_edges=modelled.system.fleet.n_edges if settings.edge_nodes else 0,
                places=None if between_machines else settings.concurrency,
                start_ahead=between_machines if ahead is None else ahead,
                first_round=done + 1,
                evaluate_every=settings.evaluate_every,
                quorum=settings.quorum,
                waiting=settings.waiting,
                max_update_norm=settings.max_update_norm,
                aggregation=aggregation(config),
                link=link,
            ),
            listener=recorder,
        )
        adapters = initial
        if checkpoint is not None:
            adapters = checkpoint.adapters
            restore_strategy(aggregator, checkpoint.strategy)
            strategy.standing = checkpoint.standing
        result = strategy.start(
            grid, to_record(adapters), num_rounds=settings.rounds, evaluate_fn=recorder.central
        )
        recorder.finish(result.arrays, strategy.ended)
        log(INFO, "results in %s", folder)
