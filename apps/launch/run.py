"""``fedsplit run``: one job on Flower's simulation engine, with an honest exit code."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedsplit.errors import FedsplitError, require
from fedsplit.flower.server.checkpoint import holds_checkpoint, load_checkpoint
from fedsplit.models import check_model
from fedsplit.report import is_finished, read_records, round_line, summary_table
from fedsplit.report.run import CONFIG, RESULTS

from ..config import job, load_config, output_folder, plain, run_settings
from ..scenario import build_system, refuse_impossible
from ..server_app import ERROR_FILE, PROGRESS, build_strategy
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ERROR_FILE).unlink(missing_ok=True)
    console.print(f"fedsplit: {config.strategy.name}, {config.rounds} rounds, output in {folder}")
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
        console.print(f"[red]run failed[/red]: {cause}", highlight=False)
        console.print(f"Flower's log: {folder / LOG}", soft_wrap=True)
        _show_how_to_go_on(folder, console)
        return 1
    console.print(summary_table(read_records(folder), folder))
    return 0


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
    settings = job(config)
    check_model(settings.model, settings.data.seq_len)
    refuse_impossible(build_strategy(config), build_system(config), settings.model)
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
                self._console.print(round_line(record, self._rounds), soft_wrap=True)
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
