"""What defences cost in loss, and what the best attack still reads of E2E texts behind each.

    python -m benchmarks.defences [--model FOLDER] [--data FOLDER] [--accelerator cpu|cuda]
        [--jobs N] [--only NAME ...]

Every member fine-tunes the shipped checkpoint (or `--model`, SmolLM2-135M) on E2E across a cut with
a defence of its own, device and server in one process. Its loss is that of
test texts evaluated through the defence, as in a run. Then a server with 150 texts of the same
domain trains the linear map and the inverter network of `fedsplit audit` on boundaries of the
trained, defended device, and reads 40 private texts. A third attack needs no training: the server's
own half says the next token, as often rightly as the model is good.

A member is named by its parts: a bottleneck's width (w), the weight of the loss against a reader
(r) or of distance correlation (c), and noise (n) in units of the norm that tokens are clipped to,
which is the median of what crosses before training. Members are independent.

The last line is JSON. It exits with 0: a frontier that falls short is an answer.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from fedsplit.apps.audit import embeddings, readers
from fedsplit.apps.coded import first_part, second_part
from rich.console import Console
from rich.table import Table

from benchmarks.audit import DATA, LOSS_INCREASE, PRIVATE_TEXTS, TOKENS, texts
from fedsplit.assets import default_checkpoint
from fedsplit.data import Batch, DataSpec, batches, load_data, training_batches
from fedsplit.execution import OptimizerSpec
from fedsplit.execution.accelerator import torch_device
from fedsplit.models import Bottleneck, ModelSpec, SplitModel, load, read_tokenizer
from fedsplit.plan import Route
from fedsplit.privacy import Defence, Observed, PrivacySpec, guessing, success
from fedsplit.seeds import generator

SAME, BARE = "same", "undefended"
TEST_TEXTS = 256


@dataclass(frozen=True)
class Member:
    """A defence: width of a bottleneck, weights of second losses, noise over the norm."""

    width: int | None = None
    reader: float = 0.0
    correlation: float = 0.0
    noise: float | None = None

    def __str__(self) -> str:
        given = (("w", self.width), ("r", self.reader), ("c", self.correlation), ("n", self.noise))
        parts = [f"{letter}{value:g}" for letter, value in given if value]
        return " ".join(parts) or BARE


MEMBERS = (
    Member(),
    Member(noise=0.3),
    Member(width=8),
    Member(width=8, reader=3),
    Member(width=8, noise=0.6),
    Member(width=8, reader=3, noise=0.6),
)
MORE = (
    Member(noise=0.1),
    Member(width=8, noise=0.3),
    Member(noise=1.0),
    Member(correlation=10),
    Member(reader=3),
    Member(reader=30),
    Member(width=2),
    Member(width=4),
    Member(width=32),
    Member(width=2, reader=3),
    Member(width=8, reader=30),
    Member(width=2, noise=0.3),
    Member(width=4, noise=0.3),
    Member(width=4, reader=3, noise=0.3),
    Member(width=8, reader=3, noise=0.3),
    Member(width=8, noise=1.0),
    Member(width=32, noise=0.3),
    Member(width=32, noise=0.6),
)


@dataclass(frozen=True)
class Study:
    """What all members have in common."""

    source: str
    data: str
    cut: int
    steps: int
    lr: float
    accelerator: str
    train_texts: int


def moved(found: Iterable[Batch], place: torch.device) -> Iterator[Batch]:
    """Yield mini-batches on `place`."""
    for batch in found:
        inputs = {name: value.to(place) for name, value in batch.inputs.items()}
        yield replace(batch, inputs=inputs)


@torch.no_grad()
def observe(model: SplitModel, route: Route, found: Iterable[Batch], defence: Defence) -> Observed:
    """Return what crosses the cut of texts."""
    vectors, tokens, lengths = [], [], []
    for batch in found:
        boundary = defence.boundary(first_part(model, route, batch.inputs), batch.inputs)
        mask = batch.inputs["attention_mask"].bool()
        vectors.append(boundary.tensors[0][mask].float())
        tokens.append(batch.inputs["input_ids"][mask])
        lengths += mask.sum(1).tolist()
    return Observed(torch.cat(vectors), torch.cat(tokens), tuple(lengths))


@torch.no_grad()
def predicted(
    model: SplitModel, route: Route, found: Iterable[Batch], privacy: PrivacySpec
) -> float:
    """Return the share of tokens that the server's own half says rightly before it gets them.

    It needs no attack: whatever keeps the model's quality keeps this.
    """
    right = total = 0
    defence = Defence(privacy, 3)
    for batch in found:
        boundary = defence.boundary(first_part(model, route, batch.inputs), batch.inputs)
        logits = second_part(model, route, batch.inputs, boundary).logits
        assert logits is not None
        mask, ids = batch.inputs["attention_mask"].bool(), batch.inputs["input_ids"]
        right += int((logits.argmax(-1)[:, :-1] == ids[:, 1:])[mask[:, 1:]].sum())
        total += int(mask.sum())
    return right / total


def measure(member: Member, study: Study) -> dict[str, object]:
    """Train a member, and return its loss and what is read."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    began = time.process_time()
    place = torch_device(study.accelerator)
    narrow = None if member.width is None else Bottleneck(after=study.cut, width=member.width)
    spec = ModelSpec(source=study.source, target_modules="all-linear", bottleneck=narrow)
    model = load(spec, device=place)
    embedding = embeddings(model)
    route = Route.two_tier(model.n_blocks, study.cut)
    data = DataSpec(
        source="e2e",
        path=study.data,
        seq_len=TOKENS,
        partition="iid",
        max_samples=study.train_texts,
    )
    samples = load_data(data, read_tokenizer(study.source), 1, 0)
    crossing = {
        name: list(moved(found, place))
        for name, found in texts(study.source, Path(study.data)).items()
    }
    privacy = PrivacySpec(reader_weight=member.reader, correlation_weight=member.correlation)
    if member.noise is not None:
        first = observe(model, route, crossing[SAME], Defence(PrivacySpec(), 0))
        clip = float(first.vectors.norm(dim=1).median())
        privacy = replace(privacy, clip=clip, noise_multiplier=member.noise, unit="token")
    segments = route.segments
    parameters = {k: v for part in segments for k, v in model.trainable(part).items()}
    model.install(parameters)
    stepper = OptimizerSpec(lr=study.lr).build(parameters.values())
    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: 1 - step / study.steps)
    defence = Defence(privacy, 0)
    model.train()
    order = training_batches(samples.train(0), 8, generator(0, "order"), study.steps)
    for batch in moved(order, place):
        boundary = defence.boundary(first_part(model, route, batch.inputs), batch.inputs)
        stepper.zero_grad()
        second_part(model, route, batch.inputs, boundary).loss.backward()  # type: ignore[no-untyped-call]
        stepper.step()
        schedule.step()
    model.eval()
    total, targets, defence = 0.0, 0, Defence(privacy, 1)
    with torch.no_grad():
        for batch in moved(islice(batches(samples.test(0), 32), TEST_TEXTS // 32), place):
            boundary = defence.boundary(first_part(model, route, batch.inputs), batch.inputs)
            output = second_part(model, route, batch.inputs, boundary)
            total, targets = (
                total + output.loss.item() * output.n_targets,
                targets + output.n_targets,
            )
    # Its own texts the server runs through the same device; noise is drawn afresh for each.
    own = observe(model, route, crossing[SAME], Defence(privacy, 2))
    private = observe(model, route, crossing[PRIVATE_TEXTS], Defence(privacy, 3))
    read = {"predicted": round(predicted(model, route, crossing[PRIVATE_TEXTS], privacy), 4)}
    read |= {
        kind: round(success(reader(private), private.tokens, private.lengths).tokens, 4)
        for kind, reader in readers(own, embedding, 0).items()
    }
    return {
        "member": str(member),
        "loss": round(total / targets, 4),
        **read,
        "read": max(read.values()),
        "guessing": round(guessing(own.tokens, private.tokens), 4),
        "bytes_per_token": own.vectors.shape[1] * 4,
        "cpu_s": round(time.process_time() - began, 1),
    }


def measured(study: Study, members: Sequence[Member], jobs: int) -> Iterator[dict[str, object]]:
    """Yield what every member came to, in order."""
    if jobs == 1:
        yield from map(partial(measure, study=study), members)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(partial(measure, study=study), members)


def main() -> None:
    """Train and attack every member; print the frontier and a verdict."""
    parser = argparse.ArgumentParser(
        description="What defences cost, and what is read all the same."
    )
    parser.add_argument("--model", type=Path, help="folder of another model")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="members at a time")
    parser.add_argument("--cut", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--more", action="store_true", help="a finer frontier")
    parser.add_argument("--only", nargs="+", help="names of members, such as 'w8 n0.6'")
    options = parser.parse_args()
    if not (options.data / "devset.csv").is_file():
        sys.exit(f"{options.data}: holds no devset.csv of the E2E data (--data)")
    other = options.model is not None
    study = Study(
        source=str(options.model or default_checkpoint()),
        data=str(options.data),
        cut=options.cut or (3 if other else 2),
        steps=options.steps or (400 if other else 150),
        lr=options.lr or (5e-4 if other else 2e-3),
        accelerator=options.accelerator,
        train_texts=4000 if other else 1500,
    )
    known = {
        str(member): member
        for member in (*MEMBERS, *(MORE if options.more or options.only else ()))
    }
    unknown = sorted(set(options.only or ()) - set(known))
    if unknown:
        sys.exit(f"--only={unknown[0]!r}: must be one of {', '.join(known)}")
    names = dict.fromkeys([BARE, *(options.only or known)])
    chosen = [known[name] for name in names]
    points = []
    for point in measured(study, chosen, options.jobs):
        points.append(point)
        print(json.dumps(point), flush=True)
    print(verdict(points))
    Console(width=100).print(frontier(points))
    print(
        json.dumps(
            {
                "model": Path(study.source).name,
                "cut": study.cut,
                "steps": study.steps,
                "frontier": points,
            }
        )
    )


def frontier(points: Sequence[dict[str, object]]) -> Table:
    """Return the table of all members, the ones that are read least first."""
    attacks = ("predicted", "ridge", "inverter", "read")
    table = Table("defence", "loss", "increase", *attacks, "bytes/token")
    base = _number(points[0], "loss")
    for point in sorted(points, key=lambda one: -_number(one, "read")):
        shares = [f"{_number(point, name):.2f}" for name in attacks]
        increase = f"{_number(point, 'loss') / base - 1:+.1%}"
        row = str(point["member"]), f"{_number(point, 'loss'):.3f}", increase, *shares
        table.add_row(*row, str(point["bytes_per_token"]))
    return table


def verdict(points: Sequence[dict[str, object]]) -> str:
    """Return in words whether a defence does what was hoped for, and how near others come."""
    base, guess = (_number(points[0], name) for name in ("loss", "guessing"))
    cheap = [one for one in points if _number(one, "loss") <= (1 + LOSS_INCREASE) * base]
    best = min(cheap, key=lambda one: _number(one, "read"))
    hidden = [one for one in points if _number(one, "read") < 2 * guess]
    said = (
        f"At {LOSS_INCREASE:.0%} more loss at most, {best['member']} is read least: {best['read']} "
        f"of the tokens (twice guessing is {2 * guess:.3f}; the server's own half of the "
        f"undefended model predicts {points[0]['predicted']}). "
    )
    if not hidden:
        return said + "No defence here is read less than twice guessing."
    least = min(hidden, key=lambda one: _number(one, "loss"))
    return said + (
        f"The cheapest that is read less than twice guessing is {least['member']}: "
        f"{least['read']}, at {_number(least, 'loss') / base - 1:+.1%} loss."
    )


def _number(point: dict[str, object], name: str) -> float:
    value = point[name]
    assert isinstance(value, int | float)
    return float(value)


if __name__ == "__main__":
    main()
