"""``fedsplit calibrate``: what each codec setting costs in loss and saves in bytes.

Trains the configured model on the configured data once without and once with each setting at the
cut, both ends in this process but every boundary through real bytes, and writes the table from
which planners choose, and a plot. A grid may also name ranks, ``{name: rank, r: 4}``, and devices
that only infer, ``{name: frozen, cut: 2}``, for `strategy=joint`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from fedsplit.codec import Loopback
from fedsplit.data import DataSpec, load_data, training_batches
from fedsplit.errors import require, require_choice
from fedsplit.execution import OptimizerSpec
from fedsplit.figures import figure, legend, styles
from fedsplit.models import ModelSpec, load
from fedsplit.plan import Route
from fedsplit.planning.codec_table import WAYS, way_size
from fedsplit.privacy import Defence, PrivacySpec
from fedsplit.report.files import csv_text, write_atomically
from fedsplit.seeds import derive_seed, generator

from .check import require_data, require_folder, require_model
from .coded import evaluate_coded, train_coded
from .config import data_spec, job, load_config
from .scenario import build_system

Settings = Mapping[str, object]

IDENTITY: Settings = {"name": "identity"}
DIRECTIONS = ("uplink", "downlink", "both")
GRID: tuple[Settings, ...] = (
    {"name": "int8", "lossless": "zstd"},
    *(
        {"name": "topk", "keep": keep, "bits": bits, "rounding": "nearest"}
        for keep in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
        for bits in (3, 4, 6)
    ),
)
"""Settings that are measured unless others are given."""
_EVAL_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class CutTraining:
    """A fine-tuning run with one cut.

    Parameters
    ----------
    model : ModelSpec
        What is trained.
    data : DataSpec
        What on; all devices' data together.
    optimizer : OptimizerSpec
        Its rate falls linearly to zero, so that runs end near a minimum and can be compared.
    cut : int
        Blocks on the device.
    batch_size, steps : int
        Mini-batches trained.
    eval_samples : int
        Test samples of the final loss, at most.
    privacy : PrivacySpec
        What the device does to boundaries before they are compressed.
    frozen : bool
        Whether the blocks before the cut only infer.
    """

    model: ModelSpec
    data: DataSpec
    optimizer: OptimizerSpec
    cut: int
    batch_size: int
    steps: int
    eval_samples: int = 256
    privacy: PrivacySpec = field(default_factory=PrivacySpec)
    frozen: bool = False

    def changed_by(self, settings: Settings) -> "CutTraining":
        """Return the same at the rank, or with the frozen blocks, of a row that is no codec."""
        size, model = way_size(settings), self.model
        if settings["name"] == "frozen":
            return replace(self, cut=size, frozen=True)
        # As a device of this rank trains it: with the scale of the whole.
        return replace(self, model=replace(model, r=size, alpha=model.alpha * size / model.r))


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Parameters
    ----------
    loss : float
        Mean loss per target on the test data, in nats, of the model run whole.
    coded_loss : float
        The same with the uplink's codec at the cut, as devices evaluate during a run.
    uplink, downlink : float
        Bytes sent over bytes of the uncompressed tensors.
    itemsize : int
        Bytes of an element of these.
    """

    loss: float
    coded_loss: float
    uplink: float
    downlink: float
    itemsize: int

    @property
    def traffic(self) -> float:
        """Bytes sent over uncompressed bytes, both ways together (they carry equal tensors)."""
        return (self.uplink + self.downlink) / 2


def fine_tune(training: CutTraining, uplink: Settings, downlink: Settings, seed: int) -> Outcome:
    """Train with these codecs at the cut, and evaluate.

    Everything random depends on `seed` alone, so that runs with other codecs can be compared.
    """
    model = load(training.model)
    route = Route.two_tier(model.n_blocks, training.cut)
    tokenizer = None
    if training.model.task == "causal-lm":
        tokenizer = AutoTokenizer.from_pretrained(training.model.source)
    data = load_data(training.data, tokenizer, 1, seed)

    up = Loopback(uplink, derive_seed(seed, "uplink"))
    down = Loopback(downlink, derive_seed(seed, "downlink"))
    order = generator(seed, "order")
    itemsize = train_coded(
        model,
        route,
        training_batches(data.train(0), training.batch_size, order, training.steps),
        ways=[(up, down)],
        optimizer=training.optimizer,
        rate=lambda step: 1 - step / training.steps,
        defence=Defence(training.privacy, derive_seed(seed, "defence")),
        frozen=training.frozen,
    )
    coded = Loopback(uplink, derive_seed(seed, "evaluation"))
    defence = Defence(training.privacy, derive_seed(seed, "evaluation"))
    loss, coded_loss = (
        evaluate_coded(
            model, route, data.test(0), _EVAL_BATCH, limit=training.eval_samples, way=way
        )[0]
        for way in (None, (defence, coded))
    )
    traffic = up.n_bytes / up.n_raw_bytes, down.n_bytes / max(down.n_raw_bytes, 1)
    return Outcome(loss, coded_loss, *traffic, itemsize)


@dataclass(frozen=True)
class Row:
    """One setting, measured: a line of the table that `fedsplit.planning.CodecTable` reads.

    Parameters
    ----------
    ratio : float
        Bytes sent over uncompressed bytes, in the compressed directions; of a rank, bytes of the
        adapters over those of all components.
    loss_increase : float
        Rise of the test loss against no compression, in nats, mean over seeds: what it did to the
        trained model, which is then run whole.
    settings : mapping
        See `fedsplit.codec.make_codec`, or the rank or frozen blocks.
    coded_loss_increase : float
        The same where the test runs through the uplink's codec too, as in a run's evaluation.
    itemsize : int
        Bytes of an uncompressed element.
    """

    ratio: float
    loss_increase: float
    settings: Settings
    coded_loss_increase: float = 0.0
    itemsize: int = 4


def measure(
    training: CutTraining, settings: Settings, direction: str, baseline: Mapping[int, float]
) -> Row:
    """Return what `settings` do, against the `baseline` losses by seed."""
    if settings["name"] in WAYS:
        training, rank = training.changed_by(settings), training.model.r
        ratio = training.model.r / rank
        losses = [fine_tune(training, IDENTITY, IDENTITY, seed).loss for seed in baseline]
        rise = fmean(loss - usual for loss, usual in zip(losses, baseline.values(), strict=True))
        return Row(ratio, rise, settings, rise)
    up = settings if direction in ("uplink", "both") else IDENTITY
    down = settings if direction in ("downlink", "both") else IDENTITY
    outcomes = [fine_tune(training, up, down, seed) for seed in baseline]
    ratios = {
        "uplink": [outcome.uplink for outcome in outcomes],
        "downlink": [outcome.downlink for outcome in outcomes],
        "both": [outcome.traffic for outcome in outcomes],
    }
    pairs = list(zip(outcomes, baseline.values(), strict=True))
    return Row(
        fmean(ratios[direction]),
        fmean(outcome.loss - loss for outcome, loss in pairs),
        settings,
        fmean(outcome.coded_loss - loss for outcome, loss in pairs),
        outcomes[0].itemsize,
    )


def calibrate(
    overrides: Sequence[str],
    *,
    output: Path,
    console: Console,
    grid: Sequence[Settings] = GRID,
    direction: str = "uplink",
    steps: int = 200,
    seeds: int = 1,
) -> int:
    """Measure `grid` for the job that `overrides` describe; return the exit code.

    Writes `output` (CSV with a column for each field of `Row`, and the codec's name) and beside it
    a plot with the same name and the suffix ``.png``.

    Parameters
    ----------
    overrides : sequence of str
        As for ``fedsplit run``: model, data, train.batch_size, train.optimizer, strategy.cut.
    grid : sequence of mapping
        Settings of codecs.
    direction : {"uplink", "downlink", "both"}
        Where they are used; SFT compresses the uplink.
    steps : int
        Mini-batches of each run.
    seeds : int
        Runs of each setting, whose mean is written.

    Raises
    ------
    FedsplitError
        If the configuration, a setting or an argument is wrong, before anything is trained.
    """
    require_choice("--direction", direction, DIRECTIONS)
    require(steps >= 1, "--steps", steps, "at least 1")
    require(seeds >= 1, "--seeds", seeds, "at least 1")
    require(len(grid) > 0, "grid", list(grid), "at least one setting")
    for settings in grid:
        if settings.get("name") in WAYS:
            way_size(settings)
        else:
            Loopback(settings, 0)
    config = load_config(overrides)
    work = job(config)
    cut = config.strategy.get("cut") or 1
    data = data_spec(config)
    require(isinstance(cut, int), "strategy.cut", cut, "a number of blocks")
    require_model(work.model, data)
    require_data(work, data)
    require_file(output)
    n_blocks = build_system(config).profile.n_blocks
    require(0 < cut < n_blocks, "strategy.cut", cut, f"1 to {n_blocks - 1}")
    for settings in grid:
        require_way(settings, work.model, n_blocks)
    training = CutTraining(
        model=work.model,
        data=data,
        optimizer=work.optimizer,
        cut=cut,
        batch_size=work.batch_size,
        steps=steps,
        privacy=work.privacy,
    )

    baseline = {
        seed: fine_tune(training, IDENTITY, IDENTITY, seed).loss
        for seed in range(work.seed, work.seed + seeds)
    }
    console.print(f"loss without compression {fmean(baseline.values()):.4f}, {steps} steps")
    title = f"{direction}, cut {cut}; evaluated: model whole / through the codec, as in a run"
    table = Table("settings", "ratio", "loss increase", "evaluated coded", title=title)
    rows = []
    for number, settings in enumerate(grid, 1):
        row = measure(training, settings, direction, baseline)
        rows.append(row)
        rises = f"{row.loss_increase:+.4f}", f"{row.coded_loss_increase:+.4f}"
        table.add_row(json.dumps(dict(settings)), f"{row.ratio:.4f}", *rises)
        console.print(f"{number}/{len(grid)} {row.ratio:.4f} {row.loss_increase:+.4f}")
    write_table(rows, output)
    plot(rows, output.with_suffix(".png"))
    console.print(table)
    console.print(f"table {output}, plot {output.with_suffix('.png')}", soft_wrap=True)
    return 0


def require_way(settings: Settings, model: ModelSpec, n_blocks: int) -> None:
    """Refuse a rank or a depth that the model does not have."""
    if settings.get("name") == "rank":
        r = way_size(settings)
        require(model.train == "lora", "rank.r", r, "absent where model.train=full")
        require(r <= model.r, "rank.r", r, f"1 to {model.r}, model.r")
    if settings.get("name") == "frozen":
        cut = way_size(settings)
        require(cut < n_blocks, "frozen.cut", cut, f"1 to {n_blocks - 1}")


def require_file(path: Path) -> None:
    """Refuse a path that no file can be written to."""
    require(not path.is_dir(), "--output", str(path), "a file, not a folder")
    require_folder(path.absolute().parent, "--output")


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write the CSV table that the SFT planner reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "ratio": row.ratio,
            "loss_increase": row.loss_increase,
            "name": row.settings["name"],
            "settings": json.dumps(dict(row.settings)),
            "coded_loss_increase": row.coded_loss_increase,
            "itemsize": row.itemsize,
        }
        for row in rows
    ]
    write_atomically(path, csv_text(lines))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw loss increase over ratio to a PNG at `path`."""
    names = list(dict.fromkeys(str(row.settings["name"]) for row in rows))
    with figure(path) as (_, axes):
        for name, style in zip(names, styles(len(names)), strict=True):
            chosen = [row for row in rows if row.settings["name"] == name]
            ratios, increases = zip(
                *((row.ratio, row.loss_increase) for row in chosen), strict=True
            )
            axes.plot(ratios, increases, label=name, **{**style, "linestyle": "none"})
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.set(xlabel="bytes sent / uncompressed", ylabel="loss increase (nats)", xscale="log")
        legend(axes)
