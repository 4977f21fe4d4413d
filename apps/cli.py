"""The ``fedsplit`` command."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from fedsplit.errors import FedsplitError, require
from fedsplit.report.tables import make_console, plain_text

_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    What is wrong with the user's input is one line on standard error, and exit code 2. What is
    wrong with the program keeps its traceback.
    """
    try:
        options = _parse(arguments)
        return int(options.command(options, make_console()))
    except (FedsplitError, HydraException, OmegaConfBaseException) as error:
        return _refuse(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        return _refuse(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return 130


def _refuse(reason: str) -> int:
    line = plain_text(" ".join(reason.split()))
    Console(stderr=True).print(
        f"[red]error[/red]: {line}", highlight=False, soft_wrap=True, emoji=False
    )
    return _USAGE


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
        # This process has seconds of imports before it: the run's root does its own meanwhile.
        engine.start()
        from .launch.run import run

        return run(options.overrides, console, engine)


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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may also stand behind options, where argparse itself takes none."""
    parser = _parser()
    options, late = parser.parse_known_args(arguments)
    if late:
        if "overrides" not in options or any(word.startswith("-") for word in late):
            parser.error(f"unknown: {' '.join(late)}; settings are written KEY=VALUE")
        options.overrides = [*options.overrides, *late]
    return options


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise FedsplitError(f"{self.prog}: {message} (see {self.prog} --help)")


def _list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedsplit", description="Split federated fine-tuning over wireless networks."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="train a model over simulated devices and servers",
        description="Runs a job on simulated devices. OVERRIDES are Hydra's, such as rounds=10 "
        "strategy=vanilla strategy.cut=3 model=gpt2 data=text data.path=notes.txt. With -m they "
        "may sweep, as in seed=0,1,2 strategy=sft,splitfed: a run for every combination.",
    )
    run.add_argument("overrides", nargs="*", metavar="OVERRIDES")
    run.add_argument("-m", "--multirun", action="store_true", help="run every combination")
    run.add_argument("--cfg", action="store_true", help="print the configuration and stop")
    run.set_defaults(command=_run)
    plan = commands.add_parser(
        "plan",
        help="say what a scheme would cost, without training",
        description="Costs the rounds of a scheme on a modelled system. With -m, OVERRIDES may "
        "sweep: channel.bandwidth_hz=5e6,10e6 'strategy=glob(*)'.",
    )
    plan.add_argument("overrides", nargs="*", metavar="OVERRIDES")
    plan.add_argument("-m", "--multirun", action="store_true", help="try every combination")
    plan.add_argument(
        "--check", type=_path, metavar="RUN", help="say how far the model was from a run's turns"
    )
    plan.set_defaults(command=_plan)
    measure = commands.add_parser(
        "measure",
        help="time the model on this machine, for its node's configuration",
        description="Times forward and backward passes of each block of the configured model and "
        "writes them down, with the memory and, where the board tells, the power of this machine.",
    )
    measure.add_argument("overrides", nargs="*", metavar="OVERRIDES")
    measure.add_argument("--output", type=_path, default=Path("machine.json"), metavar="JSON")
    measure.add_argument("--repeats", type=int, default=5, help="steps that are timed")
    measure.set_defaults(command=_measure)
    plot = commands.add_parser(
        "plot",
        help="draw a figure of a study, or make a table for LaTeX",
        description="Draws what came out of a study (fedsplit run -m) or a run as PDF, SVG, PNG, "
        "with the data beside. A line takes two metrics (delay_s eval_loss), a bar or cdf one, a "
        "heat map two keys and a metric, a table any number.",
    )
    plot.add_argument("study", type=_path, metavar="STUDY")
    plot.add_argument("names", nargs="+", metavar="METRIC")
    plot.add_argument("--kind", default="line", help="line, cdf, bar, heat, pareto or table")
    plot.add_argument("--by", type=_list, default=[], metavar="KEY,...", help="what makes a line")
    plot.add_argument("--where", action="append", default=[], metavar="KEY=VALUE")
    plot.add_argument("--ci", action="store_true", help="95 %% confidence intervals over seeds")
    plot.add_argument("--format", type=_list, default=["pdf", "svg", "png"])
    plot.add_argument("--width", type=float, default=3.5, help="inches in print")
    plot.add_argument("--output", type=_path, help="path without its suffix")
    plot.set_defaults(command=_plot)
    report = commands.add_parser(
        "report",
        help="make a page about a run or a study, or compare its schemes by a protocol",
        description="Writes one HTML page with all that is worth knowing, to be mailed. With "
        "--report, prints and writes what a protocol finds: best quality within a budget, cost to "
        "a target, or quality lost under other conditions; with a test paired by seed.",
    )
    report.add_argument("study", type=_path, metavar="STUDY")
    report.add_argument("--report", metavar="PROTOCOL", help="budget, target or robustness")
    report.add_argument("--metric", default="eval_loss", help="the quality")
    report.add_argument("--within", action="append", default=[], metavar="METRIC=VALUE")
    report.add_argument("--reach", type=float, metavar="VALUE", help="the target")
    report.add_argument("--by", type=_list, default=[], metavar="KEY,...", help="what is a scheme")
    report.add_argument("--where", action="append", default=[], metavar="KEY=VALUE")
    report.add_argument("--output", type=_path, metavar="HTML")
    report.set_defaults(command=_report)
    calibrate = commands.add_parser(
        "calibrate",
        help="measure what compression costs in loss, for strategy=sft",
        description="Trains a job with each of a grid of codec settings and writes a table of "
        "ratio and loss change, and a plot.",
    )
    calibrate.add_argument("overrides", nargs="*", metavar="OVERRIDES")
    calibrate.add_argument("--output", type=_path, default=Path("codecs.csv"), metavar="CSV")
    calibrate.add_argument("--direction", default="uplink", help="uplink, downlink or both")
    calibrate.add_argument("--steps", type=int, default=200, help="mini-batches of each setting")
    calibrate.add_argument("--seeds", type=int, default=1, help="runs of each setting")
    calibrate.add_argument("--grid", type=_path, metavar="YAML", help="a list of codec settings")
    calibrate.set_defaults(command=_calibrate)
    audit = commands.add_parser(
        "audit",
        help="measure what a curious server reads of what devices send it",
        description="Attacks the configuration that OVERRIDES describe, or the run in the folder "
        "RUN, as an honest but curious server would, and reports how much the best attack reads. "
        "With -m, OVERRIDES may sweep: strategy.cut=1,2,4 codec=identity,int8.",
    )
    audit.add_argument("overrides", nargs="*", metavar="OVERRIDES | RUN")
    audit.add_argument("-m", "--multirun", action="store_true", help="try every combination")
    audit.add_argument("--texts", type=int, nargs="+", metavar="N", help="the server's own texts")
    audit.add_argument(
        "--private", type=int, metavar="N", help="texts of the devices that it reads"
    )
    audit.add_argument(
        "--other", nargs="+", metavar="KEY=VALUE", help="texts of another domain: data=... path=..."
    )
    audit.add_argument("--output", type=_path, metavar="FOLDER")
    audit.set_defaults(command=_audit)
    deploy = commands.add_parser(
        "deploy",
        help="say which Flower commands run a topology of machines, or start them here",
        description="Prints the commands of SuperLink, edges, devices and the run for a topology "
        "file such as conf/deploy/example.yaml.",
    )
    deploy.add_argument("topology", type=_path, metavar="TOPOLOGY.yaml")
    deploy.add_argument("--start", action="store_true", help="start them all on this machine")
    deploy.add_argument("--output", type=_path, help="folder for the results, on the server")
    deploy.set_defaults(command=_deploy)
    _add_trained(commands)
    reproduce = commands.add_parser(
        "reproduce",
        help="make the comparison that a paper claims, and print claim and result",
        description="Makes the comparison of PAPER (splitllm, sft, fedsllm, fast, card, gsfl, or "
        "all) on the modelled system of conf/paper/PAPER.yaml, changed by OVERRIDES. Exit code 1 "
        "if a result, mean over seeds, is outside the range in which it counts as reproduced.",
    )
    reproduce.add_argument("paper", metavar="PAPER")
    reproduce.add_argument("overrides", nargs="*", metavar="OVERRIDES")
    reproduce.add_argument("--json", action="store_true", help="print one JSON object")
    reproduce.add_argument("--seeds", type=int, default=5, help="how many seeds to average over")
    reproduce.add_argument(
        "--train", action="store_true", help="train small models too, for minutes"
    )
    reproduce.set_defaults(command=_reproduce)
    return parser


def _add_trained(commands: "argparse._SubParsersAction[_Parser]") -> None:
    """Add the commands that take the output folder of a run."""
    export = commands.add_parser(
        "export",
        help="write what a run trained for other programs",
        description="Writes the adapter that RUN trained in PEFT's format, or with --merge the "
        "whole model with its tokenizer, and a model card.",
    )
    export.add_argument("--merge", action="store_true", help="merge the adapter into its model")
    export.add_argument("--output", type=_path, help="a new folder; by default RUN/exported")
    export.set_defaults(command=_export)
    generate = commands.add_parser(
        "generate",
        help="have the model that a run trained write text",
        description="Prints what the model goes on with after PROMPT; to a model trained on "
        "conversations PROMPT is what the user says. Greedy unless --sample.",
    )
    generate.add_argument("--max-new-tokens", type=int, default=64, help="at most")
    generate.add_argument("--sample", action="store_true", help="draw tokens")
    generate.add_argument("--temperature", type=float, default=1.0, help="of --sample")
    generate.add_argument("--top-k", type=int, help="of --sample: among so many tokens")
    generate.add_argument("--top-p", type=float, default=1.0, help="of --sample: nucleus")
    generate.add_argument("--seed", type=int, default=0, help="of --sample")
    generate.set_defaults(command=_generate)
    for command in (export, generate):
        command.add_argument("run", type=_path, metavar="RUN", help="the output folder of a run")
        command.add_argument(
            "--round", default="last", help="last, best (keep.best), or a kept one (keep.every)"
        )
    generate.add_argument("prompt", metavar="PROMPT")


if __name__ == "__main__":
    sys.exit(main())
