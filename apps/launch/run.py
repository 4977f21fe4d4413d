"""``fedsplit run``: one job on Flower's simulation engine, with an honest exit code."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedsplit.flower.server.checkpoint import holds_checkpoint, load_checkpoint
from fedsplit.report import plain_text, read_records, round_line, summary_table
from fedsplit.report.run import RESULTS

from ..check import check
from ..config import absolute, load_config, make_folder, output_folder
from ..resume import cut_short
from ..server_app import ERROR_FILE, PROGRESS
from .local_flower import LocalFlower

LOG = "flower.log"
_COMPLETED = "finished:completed"


def run(overrides: Sequence[str], console: Console) -> int:
    """Run the job that `overrides` describe; return the exit code.

    Raises
    ------
    FedsplitError
        If the configuration is wrong, before anything is started.
    """
    config = load_config(overrides)
    folder = output_folder(config)
    overrides, config = cut_short(overrides, config, folder)
    check(config, folder)
    make_folder(folder)
    (folder / ERROR_FILE).unlink(missing_ok=True)
    begin = f"fedsplit: {config.strategy.name}, {config.rounds} rounds, output in {folder}"
    console.print(plain_text(begin))
    settings = {"hydra": shlex.join(absolute(overrides, config)), "output": str(folder)}
    federation = {
        "num-supernodes": config.fleet.devices,
        "client-resources-num-cpus": 1,
        "init-args-num-cpus": config.run.concurrency,
    }
    try:
        with LocalFlower(folder / LOG) as flower, Watch(folder, config, console) as watch:
            status, details = flower.run(settings, federation, watch)
    except KeyboardInterrupt:
        _show_how_to_go_on(folder, console)
        raise
    if status != _COMPLETED:
        error = folder / ERROR_FILE
        cause = error.read_text() if error.exists() else f"{status}: {details}"
        console.print(f"[red]run failed[/red]: {plain_text(cause)}", highlight=False)
        console.print(f"Flower's log: {plain_text(folder / LOG)}", soft_wrap=True)
        _show_how_to_go_on(folder, console)
        return 1
    console.print(summary_table(read_records(folder), folder))
    return 0


def _show_how_to_go_on(folder: Path, console: Console) -> None:
    if holds_checkpoint(folder):
        command = shlex.join(["fedsplit", "run", f"resume={folder}"])
        console.print(f"go on with: {plain_text(command)}", highlight=False, soft_wrap=True)


class Watch:
    """Shows a run while it goes on: a bar on a terminal, a line for each round everywhere.

    Parameters
    ----------
    folder : Path
        The run's output, written by the server app.
    config : DictConfig
        The run's configuration.
    console : Console
        Where to show it.
    """

    def __init__(self, folder: Path, config: DictConfig, console: Console) -> None:
        self._folder = folder
        self._rounds = int(config.rounds)
        self._console = console
        resumed = config.resume is not None
        self._shown = load_checkpoint(folder).server_round + 1 if resumed else 0
        self._read_at = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting Flower", total=None)

    def __enter__(self) -> "Watch":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self) -> None:
        """Look at the run's files and show what is new."""
        results = self._folder / RESULTS
        if results.exists() and (changed := results.stat().st_mtime_ns) != self._read_at:
            self._read_at = changed
            records = read_records(self._folder)
            for record in records[self._shown :]:
                line = plain_text(round_line(record, self._rounds))
                self._console.print(line, soft_wrap=True)
            self._shown = max(self._shown, len(records))
        try:
            state = json.loads((self._folder / PROGRESS).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return
        self._progress.update(
            self._task,
            description=f"round {self._shown}/{self._rounds} {state['phase']}",
            completed=state["steps"],
            total=state["planned"],
        )
