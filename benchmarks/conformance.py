"""Train every causal language model that transformers knows, split and unsplit, and compare.

    python -m benchmarks.conformance [--only gpt2 ...] [--jobs 2] [--lora '{"use_dora":true}']
        [--checkpointing]

For each architecture of transformers' causal-LM mapping a tiny model is built, once as plain
transformers + PEFT and once per route by fedsplit, with equal weights. Both make one step in
training mode on a padded batch, dropout off, fp32. Routes: two tiers cut after 1, n/2 and n-1
blocks, three tiers, and a U shape. An architecture is *exact* if on every route the gradients of
all adapters differ by 0, and *built* if plain PEFT can train it at all.

Adapters sit where PEFT puts them by default, else on every linear layer; where that cannot be
trained or cut, on the plain linear layers that one block has to itself. Architectures that are
exact only with the token ids shared, or only with adapters in fewer places, say so in their line.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from multiprocessing.connection import Connection
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from fedsplit.errors import FedsplitError
from fedsplit.models import ModelSpec
from fedsplit.models.adapters import peft_key
from fedsplit.models.anatomy import anatomy, build_twin
from fedsplit.models.loading import assemble
from fedsplit.models.lora import DEFAULT_TARGETS, lora_config
from fedsplit.models.routes import compare, gradients
from fedsplit.models.spec import model_class, usable_config
from fedsplit.models.tiny import example_inputs, tiny_config
from fedsplit.models.weights import stir, weights_dtype
from fedsplit.plan import Route

BLOCKS = 4
FLOOR = 155
TIME_LIMIT_S, MEMORY_LIMIT = 240.0, 8 << 30


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
    """

    built: bool
    problem: str | None = None
    targets: str = ""
    shares_ids: bool = False


def routes(n_blocks: int) -> list[Route]:
    """Return the routes that every architecture is tried on."""
    return [
        *(Route.two_tier(n_blocks, cut) for cut in (1, n_blocks // 2, n_blocks - 1)),
        Route.three_tier(n_blocks, 1, n_blocks - 1),
        Route.u_shaped(n_blocks, 1, n_blocks - 1),
    ]


def plain_gradients(
    spec: ModelSpec, config: PretrainedConfig, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor | None]:
    """Return the gradients of one step of transformers + PEFT, with the weights that `spec` gives.

    The model is built, adapted and run without fedsplit; only the values of its weights are
    copied from a whole fedsplit model, and their names must match to the last one.
    """
    ours = assemble(spec, config, None, torch.device("cpu")).model
    stir(ours, spec.seed)
    dtype = weights_dtype(spec, config)
    plain = model_class(config, spec.task)._from_config(config, dtype=dtype)
    if spec.train == "full":
        plain.load_state_dict(ours.state_dict())
        trained = {name: value for name, value in plain.named_parameters() if value.requires_grad}
        plain.train()(**inputs).loss.backward()
        return {name: value.grad for name, value in trained.items()}
    adapted = get_peft_model(plain, lora_config(spec, plain))
    adapted.load_state_dict(
        {f"base_model.model.{name}": value for name, value in ours.state_dict().items()}
    )
    adapted.train()(**inputs).loss.backward()
    found = {
        peft_key(name).removeprefix("base_model.model."): value.grad
        for name, value in adapted.named_parameters()
        if value.requires_grad
    }
    aliases = set(get_peft_model_state_dict(adapted)) - set(found)
    # Beside an adapter on the embeddings PEFT saves those too, frozen as they are.
    frozen = {name for name in aliases if ".base_layer." in name}
    tied = {name for name in aliases - frozen if name in dict(adapted.named_parameters())}
    assert not tied, f"PEFT saves adapters that are not trained: {sorted(tied)[:3]}"
    return found


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


def examine(model_type: str, lora: Mapping[str, Any], checkpointing: bool = False) -> Verdict:
    """Try one architecture, with ever fewer adapters and then with shared token ids."""
    try:
        config = usable_config(tiny_config(model_type, BLOCKS), "causal-lm")
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
                lora=lora,
            )
            place = "own linear layers" if targets is None else str(targets)
            found = replace(_compare_routes(spec, config, checkpointing), targets=place)
            if found.built and (found.problem is None or not verdict.built):
                verdict = found
            elif not verdict.built:
                verdict = replace(verdict, problem=verdict.problem or found.problem)
            if found.built and found.problem is None:
                return verdict
    return verdict


def _compare_routes(spec: ModelSpec, config: PretrainedConfig, checkpointing: bool) -> Verdict:
    verdict = Verdict(False, None, "", spec.share_token_ids)
    inputs = example_inputs(config, spec.task)
    try:
        expected = plain_gradients(spec, config, inputs)
    except Exception as error:
        return replace(verdict, problem=_said(error))
    for route in routes(BLOCKS):
        try:
            found = gradients(spec, config, route, inputs, checkpointing=checkpointing)
            problem = compare(expected, found)
        except Exception as error:
            problem = _said(error)
        if problem is not None:
            return replace(verdict, built=True, problem=f"{route}: {problem}")
    return replace(verdict, built=True)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _work(
    model_type: str, lora: Mapping[str, Any], checkpointing: bool, answer: Connection
) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    answer.send(examine(model_type, lora, checkpointing))


def guarded(model_type: str, lora: Mapping[str, Any], checkpointing: bool) -> Verdict:
    """Try one architecture in a process of its own, with limits on time and memory."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(model_type, lora, checkpointing, sending))
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


def _all(
    model_types: Iterable[str], jobs: int, lora: Mapping[str, Any], checkpointing: bool
) -> Iterator[tuple[str, Verdict]]:
    names = list(model_types)
    with ThreadPoolExecutor(jobs) as pool:
        yield from zip(
            names, pool.map(guarded, names, repeat(lora), repeat(checkpointing)), strict=True
        )


def main() -> int:
    """Run the benchmark; return 1 below the floor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=None, help="architectures to try")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--lora", type=json.loads, default={}, help="fields of LoraConfig, JSON")
    parser.add_argument("--checkpointing", action="store_true", help="compute blocks again")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    start = time.monotonic()
    verdicts = {}
    for name, verdict in _all(
        options.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        options.jobs,
        options.lora,
        options.checkpointing,
    ):
        verdicts[name] = verdict
        state = "not built" if not verdict.built else "INEXACT" if verdict.problem else "exact"
        notes = [verdict.targets, "token ids shared" if verdict.shares_ids else ""]
        print(
            f"{name:28} {state:10} {verdict.problem or ', '.join(filter(None, notes))}", flush=True
        )
    built = {name: verdict for name, verdict in verdicts.items() if verdict.built}
    exact = {name: verdict for name, verdict in built.items() if verdict.problem is None}
    summary = {
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
    return int(options.only is None and len(exact) < FLOOR)


if __name__ == "__main__":
    sys.exit(main())
