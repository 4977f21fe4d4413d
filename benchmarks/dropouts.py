"""Devices that leave rounds and come back: rounds and modelled seconds to a loss, by who waits.

    python -m benchmarks.dropouts [--loss NATS] [--rounds N] [--steps N] [--seeds N]

Eight devices from a Jetson Nano to an AGX Orin train the default job. In each round a device leaves
with a probability of 10, 30 and 50 %, and is back after two modelled seconds, several turns of the
slower ones. The round waits for all, or for the first four: then what the others do is dropped, or
carried into the round in which it comes. Of each: rounds and modelled seconds until the loss on all
devices' test data is below ``--loss`` for the first time, and the loss after all rounds; with
several seeds, the mean over them.

The first seed's run with 30 % and late devices carried is repeated, one device at a time, and must
give the same numbers to the last digit. Prints a table and, last, one JSON object. Exit code 1 if
that is not so, if a run that carries does not reach the loss within its rounds, or if it takes
longer than waiting for all at 30 or 50 %.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from fedsplit.apps.launch.engine import Engine
from fedsplit.apps.launch.run import train
from rich.table import Table

from fedsplit.report import RoundRecord, make_console, read_records

RATES, QUORUM, AWAY_S = (0.1, 0.3, 0.5), 4, 2.0
ALL, DROP, CARRY = "all", "drop", "carry"
FIRST = f"run.quorum_devices={QUORUM}"
MEMBERS = {ALL: (), DROP: (FIRST, "run.late=drop"), CARRY: (FIRST, "run.late=carry")}
REPEATED = RATES[1], CARRY
TYPES = "[jetson_nano,jetson_tx2,jetson_orin_nano,jetson_agx_orin]"


def main() -> int:
    """Print the table; exit 1 if a floor is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    words = [
        "fleet.devices=8", f"fleet.types={TYPES}", "fleet.clock=[0.3,1.0]", "data.seq_len=64",
        f"rounds={options.rounds}", f"train.steps={options.steps}", "train.batch_size=4",
        f"fleet.dropout.away_s={AWAY_S}", "evaluate.max_samples=8",
    ]  # fmt: skip
    console = make_console()
    table = Table(title=f"Until a loss below {options.loss:g}, seeds: {options.seeds}")
    for heading in (
        "leave",
        "late",
        "rounds",
        "modelled s",
        "loss at the end",
        "modelled s in all",
    ):
        table.add_column(heading, justify="right")
    found: dict[str, dict[str, float | None]] = {}
    same = False
    with tempfile.TemporaryDirectory() as folder, Engine() as engine:

        def run(rate: float, seed: int, own: Sequence[str], name: str) -> list[RoundRecord]:
            left = f"fleet.dropout.probability={rate}"
            given = [*words, left, f"seed={seed}", *own, f"output={folder}/{name}"]
            output, failed = train(given, engine, console)
            records = read_records(output)
            if failed is not None or any(record.failures for record in records):
                raise SystemExit(f"{name}: {failed or 'turns failed, nothing to compare'}")
            return records

        for rate in RATES:
            for name, own in MEMBERS.items():
                key = f"{rate:.0%} {name}"
                runs = [
                    run(rate, seed, own, f"{rate}-{name}-{seed}") for seed in range(options.seeds)
                ]
                found[key] = summary(runs, options.loss)
                shown = ("-" if value is None else f"{value:.4g}" for value in found[key].values())
                table.add_row(f"{rate:.0%}", name, *shown)
                if (rate, name) == REPEATED:
                    again = run(rate, 0, (*own, "run.concurrency=1"), "again")
                    same = list(map(told, again)) == list(map(told, runs[0]))
    console.print(table)
    console.print(f"repeated, one device at a time: {'the same' if same else 'OTHER NUMBERS'}")
    print(json.dumps({"loss": options.loss, "members": found, "same": same}))
    carried = [found[f"{rate:.0%} {CARRY}"]["modelled_s"] for rate in RATES]
    waited = [found[f"{rate:.0%} {ALL}"]["modelled_s"] for rate in RATES]
    slower = [
        mine is None or (all_s is not None and rate > RATES[0] and mine > all_s)
        for rate, mine, all_s in zip(RATES, carried, waited, strict=True)
    ]
    return int(not same or any(slower))


def summary(runs: Sequence[Sequence[RoundRecord]], loss: float) -> dict[str, float | None]:
    """Return the means over runs; None where not all reach the `loss`."""
    rounds, seconds = [], []
    for records in runs:
        below = [record.round for record in records if (record.eval_loss or loss) < loss]
        rounds += below[:1]
        seconds += [sum(map(delay_s, records[: below[0] + 1]))] if below else []
    reached = len(rounds) == len(runs)
    return {
        "rounds": fmean(rounds) if reached else None,
        "modelled_s": fmean(seconds) if reached else None,
        "last_loss": fmean(records[-1].eval_loss or 0.0 for records in runs),
        "all_s": fmean(sum(map(delay_s, records)) for records in runs),
    }


def delay_s(record: RoundRecord) -> float:
    """Return the modelled seconds of a round; the evaluation before any has none."""
    return float((record.modelled or {}).get("delay_s", 0.0))


def told(record: RoundRecord) -> RoundRecord:
    """Return what a second run must say again: all but what a clock of this machine measured."""
    return replace(record, wall_s=0.0, phases=None)


if __name__ == "__main__":
    sys.exit(main())
