"""Train every causal language model that transformers knows, split and unsplit, and compare.

    python -m benchmarks.conformance [--only gpt2 ...] [--jobs 2] [--options plain dora ...]

For each architecture of transformers' causal-LM mapping a tiny model is built, once as plain
transformers + PEFT and once per route by fedsplit, with equal weights. Both make one step in
training mode on a padded batch in fp32. Routes: two tiers cut after 1, n/2 and n-1
blocks, three tiers, and a U shape. An architecture is *exact* if on every route the gradients of
all adapters differ by 0, and *built* if plain PEFT can train it at all.

Adapters sit where PEFT puts them by default, else on every linear layer; where that cannot be
trained or cut, on the plain linear layers that one block has to itself. Architectures that are
exact only with the token ids shared, or only with adapters in fewer places, say so in their line.

Each of the `OPTIONS` asked for is tried so (`plain` alone by default) and is a column of the table
at the end: exact; the largest difference beside the largest gradient, where that is rounding;
whole, for a model that depends on padding, which is sent to it; mixes, for one that does not keep
texts of a row apart. Clipping and schedules see gradients alone, so they are no columns: what they
make of equal ones is equal but for the order of a sum (docs/training.md).
"""

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from multiprocessing.connection import Connection
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from benchmarks._ways import (
    OPTIONS,
    Option,
    batches_of,
    plain_gradients,
    split_gradients,
    with_dropout,
)
from fedsplit.errors import FedsplitError
from fedsplit.models import ModelSpec
from fedsplit.models.anatomy import anatomy, build_twin
from fedsplit.models.lora import DEFAULT_TARGETS
from fedsplit.models.routes import compare, distance, ignores_padding_of
from fedsplit.models.spec import usable_config
from fedsplit.models.tiny import example_inputs, tiny_config
from fedsplit.plan import Route

BLOCKS = 4
FLOOR = 155
TIME_LIMIT_S, MEMORY_LIMIT = 240.0, 8 << 30


_ROUNDING = 1e-5


@dataclass(frozen=True)
class Verdict:
    """How an architecture fared.

    Parameters
    ----------
    built : bool
        Whether plain PEFT trains it.
    problem : str or None
        Why it is not built, or how split training differs from unsplit.
    targets : str
        Where the adapters sit.
    shares_ids : bool
        Whether later tiers were given the token ids.
    how : str
        How equal it is where there is no problem.
    """

    built: bool
    problem: str | None = None
    targets: str = ""
    shares_ids: bool = False
    how: str = "exact"


def routes(n_blocks: int) -> list[Route]:
    """Return the routes that every architecture is tried on."""
    return [
        *(Route.two_tier(n_blocks, cut) for cut in (1, n_blocks // 2, n_blocks - 1)),
        Route.three_tier(n_blocks, 1, n_blocks - 1),
        Route.u_shaped(n_blocks, 1, n_blocks - 1),
    ]


def own_linears(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the plain linear layers that one block has to itself and PEFT can adapt."""
    parts = anatomy(config, "causal-lm")
    twin = build_twin(config, "causal-lm")
    inside = set(range(parts.n_blocks))
    return tuple(
        name
        for name, module in twin.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D)
        and len(parts.of_module(name)) == 1
        and parts.of_module(name) <= inside
        and not name.endswith("out_proj")  # PEFT refuses those of Mamba layers
    )


def examine(model_type: str, option: Option = OPTIONS["plain"]) -> Verdict:
    """Try one architecture, with ever fewer adapters and then with shared token ids."""
    try:
        config = usable_config(tiny_config(model_type, BLOCKS), "causal-lm")
        if option.dropout:
            with_dropout(config, option.dropout)
        build_twin(config, "causal-lm")(**example_inputs(config, "causal-lm"))
    except Exception as error:  # whatever stops transformers from building it is the answer
        return Verdict(False, _said(error))
    try:
        anatomy(config, "causal-lm")
    except FedsplitError as error:
        return Verdict(True, str(error))
    verdict = Verdict(False, "")
    family = config.model_type.removesuffix("_text")
    default = DEFAULT_TARGETS.get(config.model_type) or DEFAULT_TARGETS.get(family)
    rungs: list[Any] = [tuple(default)] if default else ["all-linear"]
    for targets in [*rungs, None]:
        for shares in (False, True):
            spec = ModelSpec(
                model_type=config.model_type,
                target_modules=targets or own_linears(config),
                share_token_ids=shares,
                lora=option.lora,
                dropout=option.dropout,
            )
            place = "own linear layers" if targets is None else str(targets)
            found = replace(_compare_routes(spec, config, option), targets=place)
            if found.built and (found.problem is None or not verdict.built):
                verdict = found
            elif not verdict.built:
                verdict = replace(verdict, problem=verdict.problem or found.problem)
            if found.built and found.problem is None:
                return verdict
    return verdict


def _compare_routes(spec: ModelSpec, config: PretrainedConfig, option: Option) -> Verdict:
    verdict = Verdict(False, None, "", spec.share_token_ids)
    split, unsplit = batches_of(config, option)
    try:
        expected = plain_gradients(spec, config, *unsplit)
    except Exception as error:
        return replace(verdict, problem=_said(error))
    # Padding that something depends on is sent, and texts that a model mixes are refused.
    sends = option.leaves_out and not ignores_padding_of(spec, config, 1, left=False)
    option = replace(option, leaves_out=option.leaves_out and not sends)
    worst, how = 0.0, "whole" if sends else "exact"
    for route in routes(BLOCKS):
        try:
            found = split_gradients(spec, config, route, split, option)
            problem = compare(expected, found)
            off = distance(found, expected) if problem is not None else 0.0
        except Exception as error:
            problem, off = _said(error), math.inf
        worst = max(worst, off)
        rounds = (option.packing or option.shorter) and off < _ROUNDING
        if option.packing and not rounds and problem is not None:
            return replace(verdict, built=True, how="mixes")
        if problem is not None and not rounds:
            return replace(verdict, built=True, problem=f"{route}: {problem}", how=f"{off:.0e}")
    return replace(verdict, built=True, how=f"{worst:.0e}" if worst else how)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _work(model_type: str, option: Option, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    answer.send(examine(model_type, option))


def guarded(model_type: str, option: Option) -> Verdict:
    """Try one architecture in a process of its own, with limits on time and memory."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(model_type, option, sending))
    process.start()
    sending.close()
    try:
        if receiving.poll(TIME_LIMIT_S):
            verdict: Verdict = receiving.recv()
            return verdict
        return Verdict(False, f"took more than {TIME_LIMIT_S:.0f} s")
    except EOFError:
        return Verdict(False, "its process died (out of memory?)")
    finally:
        process.kill()
        process.join()


def _all(model_types: Iterable[str], jobs: int, option: Option) -> Iterator[tuple[str, Verdict]]:
    names = list(model_types)
    with ThreadPoolExecutor(jobs) as pool:
        yield from zip(names, pool.map(guarded, names, repeat(option)), strict=True)


def table(found: Mapping[str, Mapping[str, Verdict]]) -> list[str]:
    """Return the lines of a table in Markdown: architectures by options."""
    names = sorted({name for verdicts in found.values() for name in verdicts})
    lines = [f"| architecture | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for name in names:
        cells = [verdicts[name] for verdicts in found.values()]
        said = [
            "not built" if not one.built else one.how if one.problem is None else f"**{one.how}**"
            for one in cells
        ]
        lines.append(f"| {name} | {' | '.join(said)} |")
    return lines


def main() -> int:
    """Run the benchmark; return 1 below the floor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=None, help="architectures to try")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument(
        "--options", nargs="+", default=["plain"], choices=[*OPTIONS, "all"], help="ways to train"
    )
    options = parser.parse_args()
    ways = list(OPTIONS) if "all" in options.options else options.options
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    names = options.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    tables, least = {}, len(names)
    for way in ways:
        tables[way] = _one(way, names, options.jobs)
        least = min(least, sum(one.built and one.problem is None for one in tables[way].values()))
    print("\n".join(table(tables)))
    return int(options.only is None and least < FLOOR)


def _one(way: str, names: Sequence[str], jobs: int) -> dict[str, Verdict]:
    """Try one of the `OPTIONS`, print a line each and a summary, and return the verdicts."""
    start = time.monotonic()
    verdicts = {}
    for name, verdict in _all(names, jobs, OPTIONS[way]):
        verdicts[name] = verdict
        state = "not built" if not verdict.built else "INEXACT" if verdict.problem else verdict.how
        notes = [verdict.targets, "token ids shared" if verdict.shares_ids else ""]
        print(
            f"{name:28} {state:10} {verdict.problem or ', '.join(filter(None, notes))}", flush=True
        )
    built = {name: verdict for name, verdict in verdicts.items() if verdict.built}
    exact = {name: verdict for name, verdict in built.items() if verdict.problem is None}
    summary = {
        "option": way,
        "architectures": len(verdicts),
        "built": len(built),
        "exact": len(exact),
        "inexact": {name: built[name].problem for name in built if name not in exact},
        "exact_with_token_ids": [name for name, item in exact.items() if item.shares_ids],
        "exact_with_fewer_adapters": [
            name for name, item in exact.items() if item.targets == "own linear layers"
        ],
        "not_built": {name: verdicts[name].problem for name in verdicts if name not in built},
        "seconds": round(time.monotonic() - start, 1),
    }
    print(f"\n{len(exact)} exact of {len(built)} built of {len(verdicts)}", flush=True)
    print(json.dumps(summary))
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
