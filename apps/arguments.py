"""What the ``fedsplit`` command takes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fedsplit.errors import FedsplitError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may also stand behind options, where argparse itself takes none.

    Raises
    ------
    FedsplitError
        If the line is wrong; says how in one line.
    """
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
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
    measure = commands.add_parser(
        "measure",
        help="time the model on this machine, for its node's configuration",
        description="Times forward and backward passes of each block of the configured model and "
        "writes them down, with the memory and, where the board tells, the power of this machine.",
    )
    measure.add_argument("overrides", nargs="*", metavar="OVERRIDES")
    measure.add_argument("--output", type=_path, default=Path("machine.json"), metavar="JSON")
    measure.add_argument("--repeats", type=int, default=5, help="steps that are timed")
    plot = commands.add_parser(
        "plot",
        help="draw a figure of a study, or make a table for LaTeX",
        description="Draws what came out of a study (fedsplit run -m) or a run as PDF, SVG, PNG, "
        "with the data beside. A line takes two metrics (delay_s eval_loss), a bar or cdf one, a "
        "heat map two keys and a metric, a table any number.",
    )
    plot.add_argument("study", type=_path, metavar="STUDY")
    plot.add_argument("names", nargs="*", metavar="METRIC")
    plot.add_argument(
        "--kind",
        default="line",
        help="line, cdf, bar, heat, pareto or table; without metrics: labels (who holds which) or "
        "map (who stands where, with which gain) of the first run",
    )
    plot.add_argument("--by", type=_list, default=[], metavar="KEY,...", help="what makes a line")
    plot.add_argument("--where", action="append", default=[], metavar="KEY=VALUE")
    plot.add_argument("--ci", action="store_true", help="95 %% confidence intervals over seeds")
    plot.add_argument("--format", type=_list, default=["pdf", "svg", "png"])
    plot.add_argument("--width", type=float, default=3.5, help="inches in print")
    plot.add_argument("--output", type=_path, help="path without its suffix")
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
    calibrate = commands.add_parser(
        "calibrate",
        help="measure what compression costs in loss, for strategy=sft",
        description="Trains a job with each of a grid of settings (of codecs; ranks and frozen "
        "devices too) and writes a table of ratio and loss change, and a plot.",
    )
    calibrate.add_argument("overrides", nargs="*", metavar="OVERRIDES")
    calibrate.add_argument("--output", type=_path, default=Path("codecs.csv"), metavar="CSV")
    calibrate.add_argument("--direction", default="uplink", help="uplink, downlink or both")
    calibrate.add_argument("--steps", type=int, default=200, help="mini-batches of each setting")
    calibrate.add_argument("--seeds", type=int, default=1, help="runs of each setting")
    calibrate.add_argument("--grid", type=_path, metavar="YAML", help="a list of settings")
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
    deploy = commands.add_parser(
        "deploy",
        help="say which Flower commands run a topology of machines, or start them here",
        description="Prints the commands of SuperLink, edges, devices and the run for a topology "
        "file such as conf/deploy/example.yaml.",
    )
    deploy.add_argument("topology", type=_path, metavar="TOPOLOGY.yaml")
    deploy.add_argument("--start", action="store_true", help="start them all on this machine")
    deploy.add_argument("--output", type=_path, help="folder for the results, on the server")
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
    for command in (export, generate):
        command.add_argument("run", type=_path, metavar="RUN", help="the output folder of a run")
        command.add_argument(
            "--round", default="last", help="last, best (keep.best), or a kept one (keep.every)"
        )
    generate.add_argument("prompt", metavar="PROMPT")
