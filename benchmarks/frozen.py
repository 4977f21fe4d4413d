"""Devices that train their blocks beside devices that only infer and send each boundary once.

    python -m benchmarks.frozen [--cuts 1 3] [--epochs 3] [--model FOLDER --data FOLDER]

Both train whole epochs of the same samples with the same optimizer, on the shipped model and its
texts; with ``--model`` on another model and the E2E texts in ``--data``/e2e (``--cuts 3 15``). Of
each cut and kind: boundaries and labels sent up and gradients down, seconds of computing on the
devices and modelled energy, and the loss on the devices' test data.

Prints a table and, last, one JSON object. Exit code 1 if what goes up differs by more than 1 % from
its part: 1/epochs, and what an epoch left over (it has whole mini-batches only) in those after.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from fedsplit.apps.config import job, load_config
from fedsplit.apps.launch.engine import Engine
from fedsplit.apps.launch.run import train
from rich.table import Table
from transformers import AutoTokenizer

from fedsplit.data import load_data
from fedsplit.report import make_console, read_records, read_turns

MARGIN = 0.01
KINDS = {"trained": "train.device_adapters=true", "frozen": "train.device_adapters=false"}


def main() -> int:
    """Print the table; exit 1 if a floor is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuts", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--examples", type=int, default=240)
    parser.add_argument("--model", help="folder of a causal model")
    parser.add_argument("--data", type=Path, help="folder with e2e, as published")
    options = parser.parse_args()
    words = [
        "fleet.devices=2", "train.steps=null", "data.partition=iid", f"rounds={options.epochs}",
        f"evaluate.every={options.epochs}", f"data.max_samples={options.examples}",
    ]  # fmt: skip
    if options.model is not None:
        words += [
            f"model={options.model}", "data=e2e", f"data.path={options.data / 'e2e'}",
            "train.optimizer.lr=2e-3",
        ]  # fmt: skip
    part = expected_part(words, options.epochs)
    console = make_console()
    table = Table(title=f"{options.epochs} epochs; expected part of what goes up: {part:.4f}")
    for heading in ("cut", "devices", "up MB", "down MB", "computing s", "modelled J", "loss"):
        table.add_column(heading, justify="right")
    found: dict[str, dict[str, float]] = {}
    missed = False
    with tempfile.TemporaryDirectory() as folder, Engine() as engine:
        for cut in options.cuts:
            for kind, word in KINDS.items():
                own = [*words, f"strategy.cut={cut}", word, f"output={folder}/{kind}{cut}"]
                output, failed = train(own, engine, console)
                if failed is not None:
                    raise SystemExit(f"{kind}, cut {cut}: {failed}")
                row = figures(output)
                found[f"{kind}_{cut}"] = row
                shown = [f"{row[name]:.4g}" for name in ("up", "down", "compute_s", "energy_j")]
                table.add_row(str(cut), kind, *shown, f"{row['loss']:.4f}")
            share = found[f"frozen_{cut}"]["up"] / found[f"trained_{cut}"]["up"]
            found[f"frozen_{cut}"]["part"] = share
            missed |= abs(share / part - 1) > MARGIN
    console.print(table)
    print(json.dumps({"expected_part": part, "runs": found}))
    return int(missed)


def expected_part(words: list[str], epochs: int) -> float:
    """Return samples that are seen over samples that are trained on, expected, of all devices."""
    work = job(load_config(words))
    assert work.data is not None
    tokenizer = AutoTokenizer.from_pretrained(work.model.source)
    data = load_data(work.data, tokenizer, work.n_devices, work.seed)
    seen = trained = 0.0
    for device in range(work.n_devices):
        n = len(data.train(device))
        epoch = min(n, max(n // work.batch_size, 1) * work.batch_size)
        seen += n * (1 - (1 - epoch / n) ** epochs)
        trained += epochs * epoch
    return seen / trained


def figures(folder: Path) -> dict[str, float]:
    """Return what a run sent and computed, in megabytes, seconds and joules, and its last loss."""
    turns = [turn for turn in read_turns(folder) if turn.phase == "train"]
    records = read_records(folder)
    if lost := sum(len(record.failures) for record in records):
        raise SystemExit(f"{folder}: {lost} turns failed, nothing to compare")
    return {
        "up": sum(turn.bytes_up for turn in turns) / 1e6,
        "down": sum(turn.bytes_down for turn in turns) / 1e6,
        "compute_s": sum(turn.compute_s for turn in turns),
        "energy_j": sum((record.modelled or {}).get("device_energy_j", 0.0) for record in records),
        "loss": records[-1].eval_loss or 0.0,
    }


if __name__ == "__main__":
    sys.exit(main())
