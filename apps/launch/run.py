"""``fedsplit run``: checks a job, has it carried out, and shows how it goes on."""

import json
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import chain, count
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fedsplit.flower.server.checkpoint import holds_checkpoint, load_checkpoint
from fedsplit.report import (
    is_finished,
    plain_text,
    read_data_lines,
    read_records,
    read_stopped,
    round_line,
    summary_table,
)
from fedsplit.report.lock import locked
from fedsplit.report.run import RESULTS

from ..check import check
from ..config import absolute, load_config, model_spec, output_folder
from ..outputs import make_folder
from ..recorder import PROGRESS
from ..resume import cut_short
from ..run_settings import run_settings
from ..server_app import ERROR_FILE
from .engine import Engine, check_engine
from .surroundings import collect_as_usual

LOG = "flower.log"
_STARTING = "starting"
_NO_ADAPTER = "adapter/ is not written: other programs know no bottleneck; fedsplit generate does"
# Off a terminal, where no bar moves, something is printed at least so often.
_QUIET_S = 10.0


def run(overrides: Sequence[str], console: Console, engine: Engine | None = None) -> int:
    """Run the job that `overrides` describe, by `engine` if there is one; return the exit code.

    Raises
    ------
    FedsplitError
        If the configuration is wrong, before anything is started.
    """
    with ExitStack() as stack:
        if engine is None:
            engine = stack.enter_context(Engine())
        folder, cause = train(overrides, engine, console)
    if cause is not None:
        return 1
    console.print(summary_table(read_records(folder), folder))
    stopped = read_stopped(folder)
    if stopped is not None:
        console.print(plain_text(f"ended before its last round: {stopped}"), highlight=False)
    return 0


def train(overrides: Sequence[str], engine: Engine, console: Console) -> tuple[Path, str | None]:
    """Have `engine` carry out the job that `overrides` describe, and show how it goes on.

    Returns
    -------
    Path
        The folder of the run.
    str or None
        Why it failed; None if it did not.

    Raises
    ------
    FedsplitError
        If the configuration is wrong, before anything is started.
    """
    config = load_config(overrides)
    folder = output_folder(config)
    with ExitStack() as stack:
        lock = None
        if (config.output or config.resume) and folder.is_dir():
            lock = stack.enter_context(locked(folder))
            overrides, config = cut_short(overrides, config, folder)
        settings = run_settings(config)
        check_engine(settings.engine, settings.concurrency)
        sample = check(config, folder)
        if lock is None:
            folder = _make(folder, named=bool(config.output or config.resume))
            lock = stack.enter_context(locked(folder))
        begin = f"fedsplit: {config.strategy.name}, {config.rounds} rounds, output in {folder}"
        console.print(plain_text(begin), highlight=False)
        if model_spec(config).bottleneck is not None:
            console.print(_NO_ADAPTER, highlight=False, soft_wrap=True)
        if sample is not None:
            console.print("first sample, with what is learnt between [[ and ]]:", highlight=False)
            console.print(plain_text(sample), highlight=False, soft_wrap=True)
        return folder, _train(overrides, config, folder, lock, engine, console)


def _train(
    overrides: Sequence[str],
    config: DictConfig,
    folder: Path,
    lock: int,
    engine: Engine,
    console: Console,
) -> str | None:
    (folder / ERROR_FILE).unlink(missing_ok=True)
    settings = run_settings(config)
    collect_as_usual()
    try:
        with Watch(folder, config, console) as watch:
            cause = engine.carry_out(
                engine=settings.engine,
                overrides=absolute(overrides, config),
                output=folder,
                devices=config.fleet.devices,
                places=settings.concurrency,
                log=folder / LOG,
                keep_open=lock,
                watch=watch,
            )
    except KeyboardInterrupt:
        _show_how_to_go_on(folder, console)
        raise
    # What is complete is a success, even if the server's process ended badly after that.
    if cause is None or _is_complete(folder, settings.rounds):
        return None
    console.print(f"[red]run failed[/red]: {plain_text(cause)}", highlight=False, soft_wrap=True)
    console.print(plain_text(f"Flower's log: {folder / LOG}"), soft_wrap=True)
    _show_how_to_go_on(folder, console)
    return cause


def _make(folder: Path, named: bool) -> Path:
    """Make the folder of a run; one that is named by the time of day is no other run's."""
    if named:
        return make_folder(folder)
    numbers = (f"{folder.name}_{number}" for number in count(2))
    for made in chain([folder], map(folder.with_name, numbers)):
        with suppress(FileExistsError):
            made.mkdir(parents=True)
            return made
    raise AssertionError


def _is_complete(folder: Path, rounds: int) -> bool:
    if not (folder / RESULTS).exists() or not is_finished(folder):
        return False
    records = read_records(folder)
    whole = bool(records) and records[-1].round == rounds
    return whole or read_stopped(folder) is not None


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
        self._lines = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(_STARTING, total=None)
        self._state = _STARTING
        self._quiet_since = time.monotonic()

    def __enter__(self) -> "Watch":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self) -> None:
        """Look at the run's files and show what is new; off a terminal, that it is alive."""
        self._show_rounds()
        self._show_progress()
        if not self._console.is_terminal and time.monotonic() >= self._quiet_since + _QUIET_S:
            self._say(self._state)

    def _show_rounds(self) -> None:
        results = self._folder / RESULTS
        if results.exists() and (changed := results.stat().st_mtime_ns) != self._read_at:
            self._read_at = changed
            records = read_records(self._folder)
            for line in read_data_lines(self._folder)[self._lines :]:
                self._say(plain_text(line))
                self._lines += 1
            for record in records[self._shown :]:
                self._say(plain_text(round_line(record, self._rounds)))
            self._shown = max(self._shown, len(records))

    def _show_progress(self) -> None:
        try:
            state = json.loads((self._folder / PROGRESS).read_text())
        except (OSError, json.JSONDecodeError):
            return
        description = f"round {self._shown}/{self._rounds} {state['phase']}"
        self._progress.update(
            self._task, description=description, completed=state["steps"], total=state["planned"]
        )
        self._state = f"{description}: {state['steps']}/{state['planned']} steps"

    def _say(self, words: Text | str) -> None:
        self._console.print(words, soft_wrap=True)
        self._quiet_since = time.monotonic()
