"""``fedsplit run``: one job on Flower's simulation engine, with an honest exit code."""

import json
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain, count
from pathlib import Path

import yaml
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fedsplit.errors import FedsplitError, require
from fedsplit.flower.server.checkpoint import holds_checkpoint, load_checkpoint
from fedsplit.report import is_finished, read_records, round_line, summary_table
from fedsplit.report.lock import locked
from fedsplit.report.run import CONFIG, RESULTS

from ..config import job, load_config, output_folder, plain, run_settings
from ..scenario import build_system, refuse_impossible
from ..server_app import ERROR_FILE, PROGRESS, build_strategy
from .engine import carry_out, check_engine

LOG = "flower.log"
_STARTING = "starting"
# Off a terminal, where no bar moves, something is printed at least so often.
_QUIET_S = 10.0


def run(overrides: Sequence[str], console: Console) -> int:
    """Run the job that `overrides` describe; return the exit code.

    Raises
    ------
    FedsplitError
        If the configuration is wrong, before anything is started.
    """
    config = load_config(overrides)
    folder = output_folder(config)
    with ExitStack() as stack:
        lock = None
        if config.output and folder.is_dir():
            lock = stack.enter_context(locked(folder))
            overrides, config = cut_short(overrides, config, folder)
        settings = run_settings(config)
        check_engine(settings.engine, settings.concurrency)
        check(config, folder)
        if lock is None:
            folder = _make(folder, named=bool(config.output))
            lock = stack.enter_context(locked(folder))
        return _run(overrides, config, folder, lock, console)


def _run(
    overrides: Sequence[str], config: DictConfig, folder: Path, lock: int, console: Console
) -> int:
    (folder / ERROR_FILE).unlink(missing_ok=True)
    console.print(f"fedsplit: {config.strategy.name}, {config.rounds} rounds, output in {folder}")
    settings = run_settings(config)
    try:
        with Watch(folder, config, console) as watch:
            cause = carry_out(
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
    if cause is not None and not _is_complete(folder, settings.rounds):
        console.print(Text.assemble(("run failed", "red"), f": {cause}"), soft_wrap=True)
        console.print(f"Flower's log: {folder / LOG}", soft_wrap=True, markup=False)
        _show_how_to_go_on(folder, console)
        return 1
    console.print(summary_table(read_records(folder), folder))
    return 0


def _make(folder: Path, named: bool) -> Path:
    """Make the folder of a run; one that is named by the time of day is no other run's."""
    numbers = (f"{folder.name}_{number}" for number in count(2))
    for made in chain([folder], map(folder.with_name, numbers)):
        try:
            made.mkdir(parents=True, exist_ok=named)
        except FileExistsError as error:
            if named:
                raise FedsplitError(f"output={str(folder)!r}: is not a folder") from error
        except OSError as error:
            name = f"output={str(folder)!r}"
            raise FedsplitError(f"{name}: cannot be written ({error.strerror})") from error
        else:
            return made
    raise AssertionError


def _is_complete(folder: Path, rounds: int) -> bool:
    if not (folder / RESULTS).exists() or not is_finished(folder):
        return False
    records = read_records(folder)
    return bool(records) and records[-1].round == rounds


def _show_how_to_go_on(folder: Path, console: Console) -> None:
    if holds_checkpoint(folder):
        command = shlex.join(["fedsplit", "run", f"resume={folder}"])
        console.print(f"go on with: {command}", highlight=False, soft_wrap=True)


def cut_short(
    overrides: Sequence[str], config: DictConfig, folder: Path
) -> tuple[Sequence[str], DictConfig]:
    """Return what goes on with the run in `folder`, if it is this one and did not come to its end.

    It goes on after its last checkpoint, or begins anew if it did not reach one. Without a run in
    `folder`, or with ``resume=``, what is given is returned.

    Raises
    ------
    FedsplitError
        If `folder` holds another run, or this one is complete.
    """
    if config.resume is not None or not (folder / RESULTS).exists():
        return overrides, config
    name = f"output={str(folder)!r}"
    given = plain(load_config(absolute(overrides, config)))
    if yaml.safe_load((folder / CONFIG).read_text()) != given:
        raise FedsplitError(f"{name}: holds another run; use resume= or another folder")
    if is_finished(folder):
        raise FedsplitError(f"{name}: holds this run already, to its end")
    if holds_checkpoint(folder):
        resumed = [f"resume={folder}"]
        return resumed, load_config(resumed)
    (folder / RESULTS).unlink()
    return overrides, config


def check(config: DictConfig, folder: Path) -> None:
    """Find what is wrong with a configuration before anything is started.

    Raises
    ------
    FedsplitError
        Naming the field.
    """
    run_settings(config)
    refuse_impossible(build_strategy(config), build_system(config), job(config).model)
    if config.resume is not None:
        reached = load_checkpoint(folder).server_round
        least = reached + 1 if is_finished(folder) else reached
        require(config.rounds >= least, "rounds", config.rounds, f"above {reached}, already done")


def absolute(overrides: Sequence[str], config: DictConfig) -> list[str]:
    """Return `overrides` with paths that do not depend on the working folder.

    The server app runs in another folder than the user.
    """
    fixed = [item for item in overrides if not item.startswith(("resume=", "output="))]
    for key, value in (
        ("model.source", config.model.get("source")),
        ("data.path", config.data.get("path")),
        ("strategy.codec_table", config.strategy.get("codec_table")),
    ):
        if value is not None and Path(value).exists():
            fixed.append(f"++{key}='{Path(value).resolve()}'")
    if config.resume is not None:
        fixed = [item.lstrip("+") for item in fixed]
        fixed.append(f"resume={config.resume}")
    return fixed


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
            for record in records[self._shown :]:
                self._say(round_line(record, self._rounds))
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
