"""What ``fedsplit reproduce --train`` measures: small real runs of schemes and baselines."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from apps.reproduce_accuracy import measure_accuracy
from apps.reproduce_common import Figure, change, paper_config
from apps.reproduce_memory import measured_bytes
from apps.reproduce_sft import fedsplit_point
from apps.run import run
from fedsplit.errors import FedsplitError
from fedsplit.report import RoundRecord, read_records

RUNS: dict[str, dict[str, tuple[str, ...]]] = {
    "splitllm": {
        "splitfed": ("strategy=splitfed",),
        "splitllm": (
            "strategy=splitllm",
            "fleet=hierarchical",
            "fleet.devices=4",
            "fleet.edges=2",
            "rounds=4",
        ),
    },
    "sft": {
        "splitfed": ("strategy=splitfed",),
        "sft": ("strategy=sft", "strategy.cut=2"),
    },
    "fedsllm": {
        "splitfed": ("strategy=splitfed",),
        "fedsllm": ("strategy=fedsllm",),
    },
    "fast": {"vanilla": ("strategy=vanilla",), "fast": ("strategy=fast",)},
    "card": {"vanilla": ("strategy=vanilla",), "card": ("strategy=card",)},
    "gsfl": {
        "vanilla": ("strategy=vanilla",),
        "fedlora": ("strategy=fedlora",),
        "gsfl": ("strategy=gsfl",),
    },
}
"""For each paper, overrides of the baselines and of the scheme; a pass over four devices counts as
a round, so SplitLLM, which trains two of them in a round, has twice as many rounds."""
COMMON = ("rounds=2", "evaluate.every=1", "train.steps=6", "seed=0")


@dataclass(frozen=True)
class Measured:
    """What training adds to a paper's table."""

    figures: tuple[Figure, ...]
    notes: tuple[str, ...]


def train(paper: str, folder: Path) -> Measured:
    """Run a paper's scheme and baselines on the shipped model with the same seed.

    Parameters
    ----------
    paper : str
        A key of `RUNS`.
    folder : Path
        Where ``PAPER_NAME/`` holds the output of each run.

    Raises
    ------
    FedsplitError
        If a run fails; names its folder.
    """
    records = {
        name: _run([*COMMON, *overrides], folder / f"{paper}_{name}")
        for name, overrides in RUNS[paper].items()
    }
    first = next(iter(records.values()))[0]
    losses = ", ".join(f"{name} {_loss(found[-1]):.4f}" for name, found in records.items())
    note = (
        f"Trained (shipped model, 4 devices, seed 0): evaluation loss {_loss(first):.4f} before, "
        f"then {losses} nats."
    )
    figures = memory_figures() if paper == "splitllm" else ()
    if paper == "sft":
        sent = {
            name: sum(one.bytes_up["device"] for one in found if one.bytes_up)
            for name, found in records.items()
        }
        figures = (
            Figure(
                "bytes up on the wire, small real run",
                "none",
                "splitfed, uncompressed",
                change(sent["sft"], sent["splitfed"]),
            ),
            accuracy_figure(),
        )
    return Measured(figures, (note,))


def memory_figures() -> tuple[Figure, ...]:
    """Measure SplitLLM's claim on a small server process."""
    config = paper_config("splitllm", ())
    everyone, at_once = config.fleet.devices, config.fleet.edges
    baseline = measured_bytes(everyone, copies=True)
    return (
        Figure(
            "server peak memory, measured on a small ViT",
            "up to -74 %",
            f"{everyone} concurrent copies",
            change(measured_bytes(at_once, copies=True), baseline),
            (-76.0, -72.0),
            change(measured_bytes(at_once, copies=False), baseline),
            "shared weights, one mini-batch at a time",
        ),
    )


def accuracy_figure() -> Figure:
    """Measure what SFT's operating point costs an image classifier."""
    paper = paper_config("sft", ()).paper
    found = measure_accuracy(fedsplit_point(paper.keep, paper.bits))
    return Figure(
        f"accuracy lost on digits at {100 * (found.ratio - 1):.1f} % traffic (points, one seed)",
        "at most 1 point (ours: the paper's limit is unknown)",
        "the same fine-tuning uncompressed",
        found.drop_points,
        (-100.0, 1.0),
    )


def _run(overrides: Sequence[str], folder: Path) -> list[RoundRecord]:
    # Progress belongs beside the tables, not in them: --json keeps standard output to itself.
    console = Console(file=sys.stderr)
    code = run([*overrides, f"output={folder.resolve()}"], console)
    if code != 0:
        raise FedsplitError(f"training: the run in {folder} failed")
    return list(read_records(folder))


def _loss(record: RoundRecord) -> float:
    return float("nan") if record.eval_loss is None else record.eval_loss
