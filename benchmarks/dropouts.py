"""Devices that leave rounds and come back: rounds and modelled seconds to a loss, by who waits.

    python -m benchmarks.dropouts [--gain NATS] [--rounds N] [--steps N] [--seeds N]

Eight devices from a Jetson Nano to an AGX Orin train the default job. In each round a device leaves
with a probability of 10, 30 and 50 %, and is back after two modelled seconds, several turns of the
slower ones. The round waits for all, or for the first four: then what the others do is dropped, or
carried into the round in which it comes. Of each: rounds and modelled seconds until the loss on all
devices' test data is ``--gain`` below that of the untrained model for the first time, and what is
gained in all rounds; with several seeds, which draw the devices' data too, the mean over them and
in brackets the least and the most.

The first seed's run with 30 % and late devices carried is repeated, one device at a time, and must
give the same numbers to the last digit. Prints a table and, last, one JSON object. Exit code 1 if
that is not so, if a run that carries does not gain as much within its rounds, or if it takes longer
in the mean than waiting for all at 30 or 50 %.
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
Spread = dict[str, float]
"""`mean`, `least`, `most` over seeds."""
TYPES = "[jetson_nano,jetson_tx2,jetson_orin_nano,jetson_agx_orin]"


def main() -> int:
    """Print the table; exit 1 if a floor is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gain", type=float, default=0.15)
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
    table = Table(title=f"Until {options.gain:g} nats are gained, seeds: {options.seeds}")
    for heading in ("leave", "late", "rounds", "modelled s", "gained in all", "modelled s of all"):
        table.add_column(heading, justify="right")
    found: dict[str, dict[str, Spread | None]] = {}
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
                found[key] = summary(runs, options.gain)
                table.add_row(f"{rate:.0%}", name, *map(shown, found[key].values()))
                if (rate, name) == REPEATED:
                    again = run(rate, 0, (*own, "run.concurrency=1"), "again")
                    same = list(map(told, again)) == list(map(told, runs[0]))
    console.print(table)
    console.print(f"repeated, one device at a time: {'the same' if same else 'OTHER NUMBERS'}")
    print(json.dumps({"gain": options.gain, "members": found, "same": same}))
    carried = [found[f"{rate:.0%} {CARRY}"]["modelled_s"] for rate in RATES]
    waited = [found[f"{rate:.0%} {ALL}"]["modelled_s"] for rate in RATES]
    slower = [
        mine is None or (all_s is not None and rate > RATES[0] and mine["mean"] > all_s["mean"])
        for rate, mine, all_s in zip(RATES, carried, waited, strict=True)
    ]
    return int(not same or any(slower))


def summary(runs: Sequence[Sequence[RoundRecord]], gain: float) -> dict[str, Spread | None]:
    """Return what is spread over runs; None where not all gain as much."""
    rounds, seconds = [], []
    for records in runs:
        goal = loss(records[0]) - gain
        below = [record.round for record in records if loss(record) <= goal]
        rounds += below[:1]
        seconds += [sum(map(delay_s, records[: below[0] + 1]))] if below else []
    reached = len(rounds) == len(runs)
    return {
        "rounds": spread(rounds) if reached else None,
        "modelled_s": spread(seconds) if reached else None,
        "gained": spread([loss(records[0]) - loss(records[-1]) for records in runs]),
        "all_s": spread([sum(map(delay_s, records)) for records in runs]),
    }


def spread(values: Sequence[float]) -> Spread:
    """Return the mean, the least and the most of `values`."""
    return {"mean": fmean(values), "least": min(values), "most": max(values)}


def shown(one: Spread | None) -> str:
    """Return a cell of the table."""
    if one is None:
        return "-"
    mean, least, most = (f"{value:.3g}" for value in one.values())
    return mean if least == most else f"{mean} ({least} to {most})"


def loss(record: RoundRecord) -> float:
    """Return the loss on all devices' test data, which every round of these runs has."""
    assert record.eval_loss is not None
    return record.eval_loss


def delay_s(record: RoundRecord) -> float:
    """Return the modelled seconds of a round; the evaluation before any has none."""
    return float((record.modelled or {}).get("delay_s", 0.0))


def told(record: RoundRecord) -> RoundRecord:
    """Return what a second run must say again: all but what a clock of this machine measured."""
    return replace(record, wall_s=0.0, phases=None)


if __name__ == "__main__":
    sys.exit(main())
