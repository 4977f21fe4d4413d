"""What ``fedsplit reproduce --train`` measures: small real runs of schemes and baselines."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedsplit.arrays import Array
from fedsplit.errors import FedsplitError
from fedsplit.report import RoundRecord, read_records

from ..config import load_config
from ..launch.run import run
from ..plan import build_scenario
from .accuracy import Accuracy, measure_accuracy
from .common import Figure, change, paper_config
from .memory import measured_bytes

# On this band slow devices gain by a server; on the default one they keep the whole small model.
_CUT_SOMEWHERE = (
    "channel.bandwidth_hz=400e6",
    "fleet.types=[jetson_nano,jetson_tx2,jetson_orin_nano,jetson_agx_orin]",
)
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
    "fast": {
        "vanilla": ("strategy=vanilla", *_CUT_SOMEWHERE),
        "fast": ("strategy=fast", *_CUT_SOMEWHERE),
    },
    "card": {
        "vanilla": ("strategy=vanilla", *_CUT_SOMEWHERE),
        "card": ("strategy=card", *_CUT_SOMEWHERE),
    },
    "gsfl": {
        "vanilla": ("strategy=vanilla",),
        "fedlora": ("strategy=fedlora",),
        "gsfl": ("strategy=gsfl",),
    },
}
"""For each paper, overrides of the baselines and, last, of the scheme; a pass over four devices
counts as a round, so SplitLLM, which trains two of them in a round, has twice as many rounds."""
COMMON = ("rounds=2", "evaluate.every=1", "train.steps=6", "seed=0")
_MODELLED = {
    "sft": {"delay_s": "delay"},
    "fast": {"delay_s": "delay"},
    "card": {"delay_s": "delay", "server_energy_j": "server energy"},
    "gsfl": {"delay_s": "delay"},
}
"""What is compared of runs that train the same mini-batches on the same system."""


@dataclass(frozen=True)
class Trained:
    """A small real run: its overrides and what came out of its rounds, 0 first."""

    overrides: tuple[str, ...]
    rounds: Sequence[RoundRecord]

    def modelled(self, name: str) -> float:
        """Return a modelled figure of all rounds, with the bytes that were really sent."""
        return sum(float(one.modelled[name]) for one in self.rounds if one.modelled)

    def bytes_up(self) -> int:
        """Return what the devices sent, evaluation included."""
        return sum(one.bytes_up.get("device", 0) for one in self.rounds)

    def __str__(self) -> str:
        """Return the loss, and what it took."""
        plan = build_scenario(load_config(self.overrides)).plan_round(1)
        turns = [turn for branch in plan.branches for turn in branch.turns]
        cuts = ", ".join(str(turn.route.segments[0].stop) for turn in turns)
        return (
            f"{_loss(self.rounds[-1]):.4f} (cuts {cuts} at first; {len(self.rounds) - 1} rounds of "
            f"{turns[0].steps} mini-batches a device, {self.bytes_up() / 1e6:.1f} MB up, "
            f"{self.modelled('delay_s'):.1f} s modelled)"
        )


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
    runs = {
        name: _run((*COMMON, *overrides), folder / f"{paper}_{name}")
        for name, overrides in RUNS[paper].items()
    }
    *baselines, scheme = runs
    losses = "; ".join(f"{name} {found}" for name, found in runs.items())
    note = (
        "Trained for real (shipped model, 4 devices, seed 0): evaluation loss "
        f"{_loss(runs[baselines[0]].rounds[0]):.4f} nats before, then {losses}."
    )
    figures = [
        _trained(
            f"{words} of a small real run, modelled from the bytes it sent",
            name,
            change(runs[scheme].modelled(key), runs[name].modelled(key)),
        )
        for name in baselines
        for key, words in _MODELLED.get(paper, {}).items()
    ]
    if paper == "splitllm":
        figures += memory_figures()
    if paper == "sft":
        sent = change(runs["sft"].bytes_up(), runs["splitfed"].bytes_up())
        name = "bytes up on the wire, small real run"
        figures.append(_trained(name, "splitfed, uncompressed", sent))
        found = measure_accuracy()
        figures.append(accuracy_figure(found))
        note += (
            f" Test accuracy on digits, {len(found.uncompressed)} seeds: uncompressed "
            f"{_spread(100 * found.uncompressed)} %, compressed {_spread(100 * found.compressed)} "
            "%; one image is 0.28 points."
        )
    return Measured(tuple(figures), (note,))


def memory_figures() -> tuple[Figure, ...]:
    """Measure SplitLLM's claim on a small server process."""
    config = paper_config("splitllm", ())
    everyone, at_once = config.fleet.devices, config.fleet.edges
    baseline = measured_bytes(everyone, copies=True)
    few = measured_bytes(at_once, copies=True)
    shared = measured_bytes(everyone, copies=False)
    return (
        Figure(
            name="server peak memory, measured on a small ViT",
            claim="up to -74 %",
            versus=f"{everyone} concurrent copies",
            ours=change(few, baseline),
            strongest=f"{everyone} branches, shared weights, one mini-batch at a time",
            against_strongest=change(few, shared),
            gain="1 - K / N: fewer branches at a time",
            accepted=(-76.0, -72.0),
            ours_better=change(measured_bytes(at_once, copies=False), baseline),
            better="shared weights, one mini-batch at a time",
        ),
    )


def accuracy_figure(found: Accuracy) -> Figure:
    """Judge what SFT's operating point costs an image classifier by the mean over seeds."""
    ratio = 100 * (found.ratio.mean() - 1)
    lost = float(found.drop_points.mean())
    return Figure(
        name=f"accuracy lost on digits at {ratio:.1f} % traffic, mean of {len(found.ratio)} seeds: "
        f"{_spread(found.drop_points)} points",
        claim="at most 1 point (ours: the paper's limit is unknown)",
        versus="the same fine-tuning uncompressed",
        ours=lost,
        strongest="the same",
        against_strongest=lost,
        gain="nothing is gained: this is what the traffic costs",
        accepted=(-100.0, 1.0),
        unit="pt",
    )


def _trained(name: str, versus: str, ours: float) -> Figure:
    """Return a figure of a small real run, which has this baseline alone."""
    return Figure(
        name=name,
        claim="none",
        versus=versus,
        ours=ours,
        strongest="the same",
        against_strongest=ours,
        gain="as in the comparison above, at the size of the small model",
    )


def _spread(values: Array) -> str:
    """Return mean, standard deviation and range in words."""
    low, high = values.min(), values.max()
    return f"{values.mean():.1f} +- {values.std(ddof=1):.1f} ({low:.1f} to {high:.1f})"


def _run(overrides: tuple[str, ...], folder: Path) -> Trained:
    # Progress belongs beside the tables, not in them: --json keeps standard output to itself.
    console = Console(file=sys.stderr)
    code = run([*overrides, f"output={folder.resolve()}"], console)
    if code != 0:
        raise FedsplitError(f"training: the run in {folder} failed")
    return Trained(overrides, read_records(folder))


def _loss(record: RoundRecord) -> float:
    return float("nan") if record.eval_loss is None else record.eval_loss
