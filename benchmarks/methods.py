"""Ways to fine-tune across a cut side by side: quality against traffic, device memory and time.

    python -m benchmarks.methods [--seeds N] [--epochs N] [--jobs N] [key=value ...]
    python -m benchmarks.methods --model FOLDER --data FOLDER [--accelerator cuda] [--docs docs]

All members train the same adapters on the same samples for the same whole epochs with the same
optimizer, one round an epoch; the seeds are those of data, partition, adapters and channel. On the
shipped model and its texts, or with ``--model`` on another one and the E2E texts in ``--data``/e2e.
What is behind ``key=value`` goes to ``fedsplit run`` of all members.

``splitlora`` sends boundaries and gradients as they are, ``bf16`` at half the width; in
``splitfrozen`` devices only infer. ``sft`` has the codec that SFT's authors released,
``splitcom_like`` and ``splitlite_like`` what is known of those two, with a memory that lives over
turns; ``topk`` and ``temporal`` are this project's own, without and with memory.

A member that is done is a JSON file in ``--work`` and is not run again. Traffic is of all devices
and rounds: boundaries, labels and gradients as counted on the wire, adapters as modelled. Memory is
the largest of a device, measured (its process) and modelled; what its codecs remember of an epoch's
samples, which the model does not count, stands beside it. Time is that of the modelled system.
Prints a table (mean over seeds and, in brackets, least to most; of the loss also what it is more
than the first member's with the same seed) and, last, one JSON object. Exit code 1 if a member
fails or any turn of it.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedsplit.apps.config import codec_plan, load_config
from fedsplit.apps.scenario import build_system
from omegaconf import DictConfig

from benchmarks._real_page import write_page
from fedsplit.codec import make_codec
from fedsplit.report import read_records, read_turns
from fedsplit.report.files import json_text, write_atomically

MEMBERS: Mapping[str, Sequence[str]] = {
    "splitlora": ("strategy=splitfed",),
    "bf16": ("strategy=splitfed", "codec=bf16"),
    "splitfrozen": ("strategy=splitfrozen",),
    "sft": ("strategy=splitfed", "codec=sft"),
    "splitcom_like": ("strategy=splitfed", "codec=splitcom"),
    "splitlite_like": ("strategy=splitfed", "codec=splitlite"),
    "topk": ("strategy=splitfed", "codec=topk"),
    "temporal": ("strategy=splitfed", "codec=temporal", "codec.uplink.over_turns=true"),
}
# Heading, unit and form of each figure.
COLUMNS: Mapping[str, tuple[str, float, str]] = {
    "loss": ("eval loss", 1.0, ".4f"),
    "up_bytes": ("up, MB", 1e6, ".2f"),
    "down_bytes": ("down, MB", 1e6, ".2f"),
    "adapter_bytes": ("adapters, MB (modelled)", 1e6, ".2f"),
    "device_peak_bytes": ("device, MB", 1e6, ".0f"),
    "modelled_device_bytes": ("device, MB (modelled)", 1e6, ".0f"),
    "remembered_bytes": ("codec's memory, MB", 1e6, ".1f"),
    "modelled_s": ("s (modelled)", 1.0, ".1f"),
}


def member(name: str, seed: int, words: Sequence[str], work: Path) -> dict[str, Any]:
    """Return what came of a member with a seed, from its file if it was run before."""
    file = work / f"{name}_{seed}.json"
    if not file.exists():
        run = work / f"{name}_{seed}"
        command = ["-m", "fedsplit.apps", "run", *words, *MEMBERS[name], f"seed={seed}"]
        with (work / f"{name}_{seed}.log").open("w") as log:
            done = subprocess.run(
                [sys.executable, *command, f"output={run}"],
                check=False,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            raise SystemExit(f"{name}, seed {seed}: failed, see {log.name}")
        found = figures(run)
        own = load_config([*words, *MEMBERS[name]])
        found["remembered_bytes"] = remembered_bytes(own, found.pop("samples"))
        write_atomically(file, json_text(found))
        print(f"{name}, seed {seed}: done", file=sys.stderr, flush=True)
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def remembered_bytes(config: DictConfig, samples: int) -> float:
    """Return what codecs remember of a device's samples, of full length, between its turns."""
    profile, plan = build_system(config).profile, codec_plan(config)
    row = int(2 * profile.embed.boundary_bytes / profile.crossing.boundary.itemsize)
    lasting = [make_codec(way, 0).lasting for way in (plan.uplink, plan.downlink)]
    return sum(
        row * min(memory.limit_bytes // row, samples) for memory in lasting if memory is not None
    )


def figures(run: Path) -> dict[str, Any]:
    """Return what a run reached, sent, took and would take.

    Raises
    ------
    SystemExit
        If a turn of it failed: nothing to compare.
    """
    records = read_records(run)
    turns = [turn for turn in read_turns(run) if turn.phase == "train"]
    if lost := sum(len(record.failures) for record in records):
        raise SystemExit(f"{run}: {lost} turns failed, nothing to compare")
    modelled = [record.modelled for record in records if record.modelled]
    up, down = sum(turn.bytes_up for turn in turns), sum(turn.bytes_down for turn in turns)
    radio = sum(of["uplink_bytes"] + of["downlink_bytes"] for of in modelled)
    rounds = range(1, len(records))
    return {
        "loss": records[-1].eval_loss,
        "untrained_loss": records[0].eval_loss,
        "up_bytes": up,
        "down_bytes": down,
        "up_bytes_by_epoch": [sum(t.bytes_up for t in turns if t.round == n) for n in rounds],
        "down_bytes_by_epoch": [sum(t.bytes_down for t in turns if t.round == n) for n in rounds],
        "adapter_bytes": radio - up - down,
        "device_peak_bytes": max(turn.peak_bytes for turn in turns),
        "modelled_device_bytes": max(of["device_peak_bytes"] for of in modelled),
        "samples": max(turn.samples for turn in turns),
        "modelled_s": sum(of["delay_s"] for of in modelled),
    }


def table(results: Mapping[str, Any]) -> str:
    """Return the table, in Markdown; every number comes from `results`."""
    said = results["settings"]
    name_of_first, first = next(iter(results["members"].items()))
    base = statistics.mean(row["untrained_loss"] for row in first)
    head, *heads = (head for head, _, _ in COLUMNS.values())
    rows = [
        f"**Methods**: {said['model']} cut after {said['cut']}, {said['devices']} devices, "
        f"{said['epochs']} epochs of {said['examples']} examples, {said['seeds']} seeds: mean "
        f"(least to most). Untrained, the loss is {base:.4f}.\n",
        _row(["", head, f"less that of {name_of_first}, seed by seed", *heads]),
        _row(["---", *["---:"] * (1 + len(COLUMNS))]),
    ]
    for name, found in results["members"].items():
        loss, *others = (_cell(key, [row[key] for row in found]) for key in COLUMNS)
        more = [row["loss"] - base["loss"] for row, base in zip(found, first, strict=True)]
        rows.append(_row([name, loss, _cell("loss", more), *others]))
    return "\n".join([*rows, ""])


def _cell(key: str, values: Sequence[float]) -> str:
    _, unit, form = COLUMNS[key]
    mean, low, high = (format(of(values) / unit, form) for of in (statistics.mean, min, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Run what is not done yet, print all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1, help="0, 1, ...: so many")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--examples", type=int, default=120)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--cut", type=int, default=3, help="blocks on the devices")
    parser.add_argument("--members", nargs="+", default=[*MEMBERS], choices=[*MEMBERS])
    parser.add_argument("--model", help="folder of a causal model")
    parser.add_argument("--data", type=Path, help="folder with e2e, as published")
    parser.add_argument("--accelerator", default="cpu", help="as run.accelerator")
    parser.add_argument("--jobs", type=int, default=1, help="members that run at once")
    parser.add_argument("--work", type=Path, default=Path("outputs/methods"), help="for members")
    parser.add_argument("--docs", type=Path, help="write the figures into this folder's results.md")
    parser.add_argument("words", nargs="*", help="key=value for all members")
    options = parser.parse_intermixed_args()
    words = [
        f"fleet.devices={options.devices}", "train.steps=null", "data.partition=iid",
        f"rounds={options.epochs}", f"evaluate.every={options.epochs}",
        f"data.max_samples={options.examples}", f"strategy.cut={options.cut}",
        f"run.accelerator={options.accelerator}",
    ]  # fmt: skip
    if options.model is not None:
        folder = (options.data / "e2e").resolve()
        words += [
            f"model={Path(options.model).resolve()}", "data=e2e", f"data.path={folder}",
            "data.seq_len=96", "train.optimizer.lr=2e-3",
        ]  # fmt: skip
    words += options.words
    settings = {
        "model": "the shipped model" if options.model is None else Path(options.model).name,
        **{key: getattr(options, key) for key in ("cut", "devices", "epochs", "examples")},
        "words": [word for word in words if not word.startswith(("model=", "data.path="))],
    }
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    said = work / "study.json"
    if said.exists() and json.loads(said.read_text()) != settings:
        raise SystemExit(f"{work}: holds members of another study; use another --work")
    write_atomically(said, json_text(settings))

    def run(name: str, seed: int) -> Callable[[], dict[str, Any]]:
        return at_once.submit(member, name, seed, words, work).result

    with ThreadPoolExecutor(options.jobs) as at_once:
        begun = {
            name: [run(name, seed) for seed in range(options.seeds)] for name in options.members
        }
        members = {name: [ended() for ended in of] for name, of in begun.items()}
    results = {"settings": {**settings, "seeds": options.seeds}, "members": members}
    print(table(results))
    if options.docs is not None:
        write_page(results, options.docs, "methods", table)
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
