"""The ``fedsplit`` command."""

import argparse
import sys
from collections.abc import Sequence

from omegaconf import OmegaConf
from rich.console import Console

from fedsplit.errors import FedsplitError
from fedsplit.report import make_console

_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    console = make_console()
    try:
        return int(options.command(options, console))
    except FedsplitError as error:
        Console(stderr=True).print(f"[red]error[/red]: {error}", highlight=False, soft_wrap=True)
        return _USAGE
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; go on with resume=FOLDER")
        return 130


def _run(options: argparse.Namespace, console: Console) -> int:
    from apps.config import load_config
    from apps.run import run

    if options.cfg:
        console.print(OmegaConf.to_yaml(load_config(options.overrides)), end="", markup=False)
        return 0
    return run(options.overrides, console)


def _plan(options: argparse.Namespace, console: Console) -> int:
    from apps.plan import plan

    return plan(options.overrides, options.multirun, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedsplit", description="Split federated fine-tuning over wireless networks."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="train a model over simulated devices and servers",
        description="Runs a job with `flwr run`. OVERRIDES are Hydra's, such as rounds=10 "
        "strategy=vanilla strategy.cut=3 model=gpt2 data=text data.path=notes.txt.",
    )
    run.add_argument("overrides", nargs="*", metavar="OVERRIDES")
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
    plan.set_defaults(command=_plan)
    return parser


if __name__ == "__main__":
    sys.exit(main())
