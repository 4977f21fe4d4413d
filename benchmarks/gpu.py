"""Split training on one GPU: gradients, speed, branches and memory; see `benchmarks/gpu.sh`.

    python -m benchmarks.gpu [--shapes gpt2 llama-1b] [--output gpu.json] [--device cuda]

Random weights of GPT-2 small's and of Llama-3.2-1B's shape. The link is in one process, with the
same frames, so that tensors go through the host's memory as they would to a network card:

- `gradient_error`: the adapters after an SGD step of the split model against those of the unsplit
  one, over the length of the step;
- `split_over_unsplit_speed`: against a PEFT loop as a user writes it, bursts that take turns;
- `batched_speed`: 1, 8 and 32 branches in one forward pass against one by one, 64 tokens each
  (`benchmarks._together`);
- `peak_mb`: memory that torch had on the GPU for each.

Each line is written when it is known, so what was measured stays if time runs out.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.branches import DROPS, Server, compare
from fedsplit.data import Batch
from fedsplit.execution import OptimizerSpec, Stage, train_turn
from fedsplit.models import ModelSpec, SplitModel, load
from fedsplit.plan import Route
from fedsplit.transport import InProcessLink, OpenRequest, new_token

_LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _llama(sizes: dict[str, Any], dtype: str) -> ModelSpec:
    targets = ("q_proj", "v_proj")
    return ModelSpec(model_type="llama", config=sizes, dtype=dtype, target_modules=targets)


# Model, cut, samples and tokens of a mini-batch.
SHAPES: dict[str, tuple[ModelSpec, int, int, int]] = {
    "gpt2": (ModelSpec(model_type="gpt2", config=DROPS, target_modules=("c_attn",)), 3, 8, 256),
    "llama-1b": (_llama(_LLAMA, "bfloat16"), 4, 4, 512),
    "tiny": (_llama(_TINY, "float32"), 1, 2, 16),
}
COUNTS, BRANCH_TOKENS = (1, 8, 32), 64


class Bench:
    """A model whole and split, on a device."""

    def __init__(self, shape: str, device: str) -> None:
        spec, cut, samples, tokens = SHAPES[shape]
        self.device, self.spec, self.cut = device, spec, cut
        self.model: SplitModel = load(spec, device=device)
        blocks = self.model.n_blocks
        self.routes = {"unsplit": Route.device_only(blocks), "split": Route.two_tier(blocks, cut)}
        torch.manual_seed(0)
        ids = torch.randint(0, int(self.model.config.vocab_size), (samples, tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        self.batch = Batch(inputs, tuple(range(samples)))
        self.start = self.model.adapters(self.routes["unsplit"].segments[0])

    def turn(self, name: str, optimizer: OptimizerSpec, steps: int) -> dict[str, torch.Tensor]:
        """Run a turn of one device; return all adapters."""
        route, stage, token = self.routes[name], Stage(self.model), new_token()
        entrance: dict[str, Any] = {}
        if len(route.segments) > 1:
            stage.open_turn(OpenRequest(token, route, 1), self.start, optimizer)
            entrance = {"link": InProcessLink(stage), "token": token}
        batches = [self.batch] * steps
        common: dict[str, Any] = {"adapters": self.start, "optimizer": optimizer, "seed": 0}
        found = train_turn(self.model, route, batches, **common, **entrance).adapters
        return found | (stage.adapters(token) if entrance else {})

    def gradient_error(self) -> float:
        """Return how far a step of the split model is from the unsplit one's, of its length."""
        # B starts at zero, where A has no gradient: first go somewhere else.
        self.start = self.turn("unsplit", OptimizerSpec("adamw", lr=1e-2), 3)
        sgd = OptimizerSpec("sgd", lr=1.0)
        whole, split = (self.turn(name, sgd, 1) for name in ("unsplit", "split"))
        apart = sum(float((split[n] - whole[n]).float().norm() ** 2) for n in whole)
        length = sum(float((whole[n] - self.start[n]).float().norm() ** 2) for n in whole)
        return float((apart / length) ** 0.5)

    def peft_loop(self) -> Callable[[int], object]:
        """Return a plain loop over the same model with PEFT's adapters of its own."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        config = self.spec.load_config()
        dtype = next(iter(self.model.model.parameters())).dtype
        base = AutoModelForCausalLM.from_config(config, dtype=dtype).to(self.device)
        targets = list(self.spec.target_modules or ())
        gpt2 = self.spec.model_type == "gpt2"
        lora = LoraConfig(r=self.spec.r, lora_alpha=16, target_modules=targets, fan_in_fan_out=gpt2)
        model = get_peft_model(base, lora).train()
        inputs = {name: value.to(self.device) for name, value in self.batch.inputs.items()}
        trained = [item for item in model.parameters() if item.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

        def run(steps: int) -> None:
            for _ in range(steps):
                model(**inputs).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        return run

    def speed(self, steps: int, repeats: int) -> dict[str, Any]:
        """Return seconds of a step and peak memory, plain and split, and the ratio of bursts."""
        spec = OptimizerSpec(lr=1e-4)
        contestants: dict[str, Callable[[int], object]] = {
            "unsplit": self.peft_loop(),
            "split": lambda count: self.turn("split", spec, count),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        peaks: dict[str, float] = {}
        for repeat in range(repeats + 1):
            for name, run in contestants.items():
                _reset_peak(self.device)
                begun = _now(self.device)
                run(steps)
                if repeat:  # the first warms up
                    seconds[name].append((_now(self.device) - begun) / steps)
                    peaks[name] = _peak_mb(self.device)
        pairs = zip(seconds["unsplit"], seconds["split"], strict=True)
        return {
            "split_over_unsplit_speed": statistics.median(a / b for a, b in pairs),
            **{f"{name}_ms": 1e3 * statistics.median(each) for name, each in seconds.items()},
            "peak_mb": peaks,
        }


def branches(shape: str, device: str, repeats: int) -> dict[str, Any]:
    """Return what branches cost a server one by one and in one pass."""
    spec, cut, _, tokens = SHAPES[shape]
    server, found = Server(spec, cut, device), {}
    for count in COUNTS:
        _reset_peak(device)
        apart, joined, speed = compare(server, count, min(BRANCH_TOKENS, tokens), repeats)
        found[str(count)] = {
            "one_by_one_ms": apart,
            "together_ms": joined,
            "batched_speed": speed,
            "peak_mb": _peak_mb(device),
        }
    return found


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_mb(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0


def main() -> int:
    """Measure one shape after the other; return 1 if a split step is not the unsplit one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["gpt2", "llama-1b"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    card = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    found: dict[str, Any] = {"device": options.device, "card": card, "versions": versions}

    def say(shape: str, figures: dict[str, Any]) -> None:
        found[shape] = found.get(shape, {}) | figures
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({shape: figures}), flush=True)

    exact = True
    for shape in options.shapes:
        bench = Bench(shape, options.device)
        error = bench.gradient_error()
        exact &= error < (1e-4 if SHAPES[shape][0].dtype != "bfloat16" else 2e-2)
        say(shape, {"gradient_error": error})
        say(shape, bench.speed(options.steps, options.repeats))
        del bench
        say(shape, {"branches": branches(shape, options.device, options.repeats)})
    print(json.dumps({"exact": exact}))
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
