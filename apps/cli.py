"""The ``fedsplit`` command."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from rich.console import Console

from fedsplit.errors import FedsplitError, require
from fedsplit.report.tables import make_console, plain_text

from .arguments import parse
from .refusal import exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (`exit_code`)."""

    def command() -> int:
        options = parse(arguments)
        return _COMMANDS[options.command](options, make_console())

    return exit_code(command)


def _run(options: argparse.Namespace, console: Console) -> int:
    from .config import load_config, require_plain

    if options.multirun:
        require(not options.cfg, "--cfg", True, "absent with -m")
        from .study import run_study

        return run_study(options.overrides, console)
    config = load_config(options.overrides)
    require_plain(config)
    if options.cfg:
        console.print(OmegaConf.to_yaml(config), end="", markup=False, emoji=False, soft_wrap=True)
        return 0
    from .launch.engine import Engine

    with Engine() as engine:
        if "torch" in sys.modules:
            from .launch.run import run

            return run(options.overrides, console, engine)
        from .launch.front import run_in_front

        return run_in_front(options.overrides, engine)


def _plan(options: argparse.Namespace, console: Console) -> int:
    from .config import load_config

    if options.check is not None:
        from .plan_check import check_run

        alone = not options.overrides and not options.multirun
        require(alone, "--check", str(options.check), "the only thing that is asked for")
        return check_run(options.check, console)
    if not options.multirun:
        load_config(options.overrides)
    from .plan import plan

    return plan(options.overrides, options.multirun, console)


def _measure(options: argparse.Namespace, console: Console) -> int:
    from .config import load_config, require_plain

    require_plain(load_config(options.overrides))
    from .measure import measure

    return measure(options.overrides, options.output, options.repeats, console)


def _plot(options: argparse.Namespace, console: Console) -> int:
    from fedsplit.report.studies.charts import chart, write
    from fedsplit.report.studies.frame import Study

    study = Study.open(options.study)
    if not options.names and options.kind in ("labels", "map"):
        from .worlds import world

        made = world(study, options.kind, options.where)
    else:
        made = chart(
            study,
            options.names,
            kind=options.kind,
            by=options.by,
            where=options.where,
            ci=options.ci,
        )
    named = "_".join((options.kind, *options.names))
    stem = options.output or study.folder / "figures" / named
    for path in write(made, stem, options.format, options.width):
        console.print(plain_text(path), highlight=False, soft_wrap=True)
    return 0


def _report(options: argparse.Namespace, console: Console) -> int:
    from .report import limits, report_page, report_protocol

    if options.report is None:
        return report_page(options.study, options.output, console)
    require(options.output is None, "--output", str(options.output), "absent with --report")
    return report_protocol(
        options.study,
        options.report,
        console,
        metric=options.metric,
        within=limits(options.within),
        reach=options.reach,
        by=options.by,
        where=options.where,
    )


def _calibrate(options: argparse.Namespace, console: Console) -> int:
    from .config import load_config, require_plain

    require_plain(load_config(options.overrides))
    grid = None if options.grid is None else _read_grid(options.grid)
    from .calibrate import GRID, calibrate

    return calibrate(
        options.overrides,
        output=options.output,
        console=console,
        grid=GRID if grid is None else grid,
        direction=options.direction,
        steps=options.steps,
        seeds=options.seeds,
    )


def _audit(options: argparse.Namespace, console: Console) -> int:
    from .audit import COUNTS, PRIVATE, Server, audit

    server = Server(
        counts=tuple(options.texts or COUNTS),
        private=PRIVATE if options.private is None else options.private,
        other=tuple(options.other or ()),
    )
    return audit(
        options.overrides,
        multirun=options.multirun,
        server=server,
        console=console,
        output=options.output,
    )


def _read_grid(file: Path) -> list[dict[str, Any]]:
    allowed = "a YAML file with a list of codec settings"
    try:
        grid = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FedsplitError(f"--grid={str(file)!r}: must be {allowed} ({error})") from error
    listed = isinstance(grid, list) and all(isinstance(item, dict) for item in grid)
    require(listed, "--grid", str(file), allowed)
    return list(grid)


def _deploy(options: argparse.Namespace, console: Console) -> int:
    from .launch.deploy import deploy

    return deploy(options.topology, options.start, console, options.output)


def _export(options: argparse.Namespace, console: Console) -> int:
    from .trained import export

    return export(options.run, options.round, options.output, merge=options.merge, console=console)


def _generate(options: argparse.Namespace, console: Console) -> int:
    from fedsplit.execution.generation import Generation

    from .trained import write_text

    how = Generation(
        max_new_tokens=options.max_new_tokens,
        sample=options.sample,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    return write_text(options.run, options.round, options.prompt, how, console)


def _reproduce(options: argparse.Namespace, console: Console) -> int:
    from .reproduce.papers import reproduce

    return reproduce(
        options.paper,
        options.overrides,
        console,
        as_json=options.json,
        training=options.train,
        seeds=options.seeds,
    )


_COMMANDS: dict[str, Callable[[argparse.Namespace, Console], int]] = {
    "run": _run,
    "plan": _plan,
    "measure": _measure,
    "plot": _plot,
    "report": _report,
    "calibrate": _calibrate,
    "audit": _audit,
    "deploy": _deploy,
    "reproduce": _reproduce,
    "export": _export,
    "generate": _generate,
}


if __name__ == "__main__":
    sys.exit(main())
