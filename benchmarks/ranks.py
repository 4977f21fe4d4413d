"""Devices of ranks 2 to 16: what each way of aggregating their adapters leaves of the loss.

    python -m benchmarks.ranks [--rounds N] [--steps N] [--seeds 0 1] [--jobs N]
    python -m benchmarks.ranks --model FOLDER --data FOLDER

Eight devices, two of each rank 2, 4, 8 and 16, train the default job over the same mini-batches;
with ``--model`` another model, on the E2E texts in ``--data``/e2e. ``everyone 16`` is what equal
ranks would give. Of each: the loss of the whole adapter on all devices' test data (mean, least and
most over seeds), the aggregation error of the last round, and the bytes of adapters that all
devices are sent in it, with the residuals of FedEx-LoRA and stacking, which grow from round to
round. ``--jobs`` runs go on at once.

Then FFA-LoRA and FedEx-LoRA on random adapters of the model's shapes, beside the mean of the dense
matrices that they stand for. Prints a table and, last, one JSON object. Exit code 1 if padding
leaves a lower loss than raFLoRA, or one of the two exact ones is off by more than 1e-6.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean

import torch
from fedsplit.apps.config import load_config, model_spec
from fedsplit.apps.launch.engine import Engine
from fedsplit.apps.launch.run import train
from rich.table import Table
from torch import Tensor

from fedsplit.execution.aggregate import AGGREGATIONS as WAYS
from fedsplit.execution.aggregate import FFA, MEAN, PADDED, RAFLORA, Part, aggregate
from fedsplit.growth import FEDEX, growth
from fedsplit.models import load
from fedsplit.models.ranks import at_rank, pair_of, residual_of, residuals
from fedsplit.plan import DEVICE, Segment
from fedsplit.report import make_console, read_records

RANKS, CUT, EXACT = (2, 2, 4, 4, 8, 8, 16, 16), 2, 1e-6
WHOLE = max(RANKS)
MIXED = f"model.r_by_device=[{','.join(map(str, RANKS))}]"
MEMBERS = {how: (MIXED, f"aggregator.adapters={how}") for how in WAYS}
MEMBERS["everyone 16"] = (f"aggregator.adapters={MEAN}",)


def main() -> int:
    """Print the table; exit 1 if a floor is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--model", help="folder of a causal model")
    parser.add_argument("--data", type=Path, help="folder with e2e, as published")
    options = parser.parse_args()
    words = [
        f"fleet.devices={len(RANKS)}", f"model.r={WHOLE}", f"model.alpha={2 * WHOLE}",
        f"rounds={options.rounds}", f"train.steps={options.steps}", f"strategy.cut={CUT}",
        f"evaluate.every={options.rounds}",
    ]  # fmt: skip
    if options.model is not None:
        words += [
            f"model={options.model}", "data=e2e", f"data.path={options.data / 'e2e'}",
            "train.optimizer.lr=2e-3", "evaluate.max_samples=16", "data.max_samples=4000",
        ]  # fmt: skip
    console = make_console()
    table = Table(title=f"{len(RANKS)} devices of ranks {RANKS}, {options.rounds} rounds")
    for heading in (
        "",
        "loss",
        "of seeds",
        "aggregation error",
        "MB to devices, last round",
    ):
        table.add_column(heading, justify="right")
    model = load(model_spec(load_config(words)))
    first = Segment(DEVICE, 0, CUT)
    forms, beside = model.forms(first), residuals(model.forms(first, residuals=True))
    found: dict[str, dict[str, float | list[float]]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        ends = {
            (name, seed): pool.submit(
                outcome, [*words, *own, f"seed={seed}", f"output={folder}/{name}_{seed}"]
            )
            for name, own in MEMBERS.items()
            for seed in options.seeds
        }
        for name, own in MEMBERS.items():
            losses, errors = zip(
                *(ends[name, seed].result() for seed in options.seeds), strict=True
            )
            ranks = RANKS if MIXED in own else [WHOLE] * len(RANKS)
            sent = sum(_n_bytes(at_rank(forms, rank)) for rank in ranks)
            residual = (options.rounds - 1) * growth(name, ranks, WHOLE)
            sent += len(ranks) * sum(
                min(residual / min(most.shape), 1) * most.nbytes for most in beside.values()
            )
            loss, error = mean(losses), mean(errors)
            found[name] = {
                "loss": loss, "losses": list(losses), "error": error, "adapter_bytes": sent
            }  # fmt: skip
            spread = f"{min(losses):.4f} to {max(losses):.4f}"
            table.add_row(name, f"{loss:.4f}", spread, f"{error:.2g}", f"{sent / 1e6:.3f}")
    exact = deviations(model.forms(Segment(DEVICE, 0, model.n_blocks)))
    console.print(table)
    for name, off in exact.items():
        console.print(
            f"{name}: off the mean of the dense matrices by {off:.1e} of its norm at most"
        )
    print(json.dumps({"members": found, "off_dense": exact}))
    worse = found[RAFLORA]["loss"] > found[PADDED]["loss"]  # type: ignore[operator]
    return int(worse or max(exact.values()) > EXACT)


def outcome(overrides: Sequence[str]) -> tuple[float, float]:
    """Run a job; return the loss and the aggregation error of its last round."""
    with Engine() as engine:
        output, failed = train(overrides, engine, make_console())
    records = read_records(output)
    lost = sum(len(record.failures) for record in records)
    if failed is not None or lost:
        raise SystemExit(f"{output}: {failed or f'{lost} turns failed, nothing to compare'}")
    last = records[-1]
    assert last.eval_loss is not None
    assert last.aggregation_error is not None
    return last.eval_loss, last.aggregation_error


def deviations(forms: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how far FFA-LoRA and FedEx-LoRA are from the dense mean, of its norm, at most."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> dict[str, Tensor]:
        return {name: torch.randn(form.shape, generator=generator) for name, form in forms.items()}

    a = {name: value for name, value in drawn().items() if pair_of(name) is not None}
    frozen = [Part(adapters=drawn() | a, weight=1 + k, rank=r) for k, r in enumerate(RANKS)]
    free = [Part(adapters=drawn(), weight=1 + k, rank=r) for k, r in enumerate(RANKS)]
    averaged = aggregate(FFA, frozen)
    whole = aggregate(FEDEX, free)
    return {
        "ffa": max(_off(_dense(averaged, name), frozen, name) for name in a),
        "fedex": max(_off(_dense(whole, name), free, name) for name in a),
    }


def _dense(adapters: Mapping[str, Tensor], name: str) -> Tensor:
    pairs = [(pair_of(name), name), (residual_of(pair_of(name) or ""), residual_of(name))]
    found = [
        adapters[b or ""].double().flatten(1) @ adapters[a or ""].double().flatten(1)
        for b, a in pairs
        if a in adapters
    ]
    return torch.stack(found).sum(0)


def _off(dense: Tensor, parts: Sequence[Part], name: str) -> float:
    total = sum(part.weight for part in parts)
    mean = sum(
        (part.weight / total * _dense(at_rank(part.adapters, part.rank), name) for part in parts),
        torch.zeros_like(dense),
    )
    return float((dense - mean).norm() / mean.norm())


def _n_bytes(adapters: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in adapters.values())


if __name__ == "__main__":
    sys.exit(main())
