"""What branches cost a server, and what it gains if several share a forward pass.

    python -m benchmarks.branches [--model gpt2] [--repeats 5] [--tokens N ...] [--branches N ...]

Two tables of CPU seconds on one thread (they hold on a busy machine), forward and backward pass of
the server's part of a model, cut after 3 blocks of GPT-2 small's shape, or after 1 of the default
job's model:

- 1, 8, 32 and 128 branches one by one: seconds a branch and step, and peak memory;
- 8 branches, one sample each, of 16, 32, 128 and 512 tokens: one by one, and in one forward pass
  over the rows of all, with each branch's LoRA by a grouped product (`benchmarks._together`).
  `batched_speed` is the median of ratios of rounds in which both took turns. Gradients of both are
  compared first.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks._contestants import _peak_mb
from benchmarks._together import train_together
from fedsplit.assets import default_checkpoint
from fedsplit.execution import OptimizerSpec
from fedsplit.execution.tier import Tier
from fedsplit.models import Boundary, ModelSpec, load
from fedsplit.plan import DEVICE, Route, Segment

COUNTS, LENGTHS, TOGETHER = (1, 8, 32, 128), (16, 32, 128, 512), 8
DROPS = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
SHAPES = {
    "gpt2": (ModelSpec(model_type="gpt2", config=DROPS, target_modules=("c_attn",)), 3),
    "small": (ModelSpec(source=str(default_checkpoint())), 1),
}


class Server:
    """The part of a model behind the cut, with what arrives there in a mini-batch."""

    def __init__(self, spec: ModelSpec, cut: int, device: str = "cpu") -> None:
        self.model = load(spec, device=device)
        self.route = Route.two_tier(self.model.n_blocks, cut)
        self.segment: Segment = self.route.segments[1]
        self.start = self.model.adapters(self.segment)
        self._near = Segment(DEVICE, 0, cut)
        self.longest = int(self.model.config.max_position_embeddings)

    def now(self) -> float:
        """Return the CPU seconds of this process; on a GPU, the time once it has nothing to do."""
        if self.model.model.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def tiers(self, count: int) -> list[Tier]:
        """Return so many branches, from adapters that differ."""
        return [
            Tier(
                self.model,
                [self.segment],
                {name: value + 0.01 * number for name, value in self.start.items()},
                OptimizerSpec(lr=1e-3),
                0,
            )
            for number in range(count)
        ]

    def mini_batches(self, count: int, tokens: int) -> list[tuple[dict[str, Any], Boundary]]:
        """Return what arrives of `count` devices, a sample of so many `tokens` each."""
        found = []
        for _ in range(count):
            ids = torch.randint(0, self.model.config.vocab_size, (1, tokens))
            ids = ids.to(self.model.model.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            with torch.no_grad():
                sent = self.model.run(self._near, inputs)
            assert isinstance(sent, Boundary)
            leaves = tuple(item.detach().requires_grad_() for item in sent.tensors)
            boundary = Boundary(leaves, sent.layout)
            found.append((self.model.travelling(inputs, self.route), boundary))
        return found


def one_by_one(server: Server, tiers: Sequence[Tier], arrived: Sequence[Any]) -> float:
    """Return the seconds of a step of every branch."""
    begun = server.now()
    for tier, (inputs, boundary) in zip(tiers, arrived, strict=True):
        tier.train_on(server.segment, inputs, boundary)
    return server.now() - begun


def together(server: Server, tiers: Sequence[Tier], arrived: Sequence[Any]) -> float:
    """Return the seconds of a step of all branches in one pass."""
    begun = server.now()
    inputs, boundaries = zip(*arrived, strict=True)
    branches = [tier._parameters for tier in tiers]
    train_together(server.model, server.segment, branches, inputs, boundaries)
    return server.now() - begun


def gradients(tiers: Sequence[Tier], arrived: Sequence[Any]) -> list[torch.Tensor]:
    """Return all gradients collected, and let go of them."""
    leaves = [item for tier in tiers for item in tier._parameters.values()]
    leaves += [item for _, boundary in arrived for item in boundary.tensors]
    found = [item.grad for item in leaves if item.grad is not None]
    for item in leaves:
        item.grad = None
    return found


def compare(server: Server, count: int, tokens: int, repeats: int) -> tuple[float, float, float]:
    """Return milliseconds a branch and step apart and together, and the median ratio."""
    arrived, tiers = server.mini_batches(count, tokens), server.tiers(count)
    one_by_one(server, tiers, arrived)
    expected = gradients(tiers, arrived)
    together(server, tiers, arrived)
    for a, b in zip(expected, gradients(tiers, arrived), strict=True):
        far = float((a - b).norm() / a.norm().clamp_min(1e-12))
        if not far < (1e-3 if a.dtype == torch.float32 else 0.1):
            raise RuntimeError(f"gradients differ by {far:g} of their norm")
    pairs = []
    for _ in range(repeats):
        pairs.append((one_by_one(server, tiers, arrived), together(server, tiers, arrived)))
        gradients(tiers, arrived)
    apart, joined = (1e3 * statistics.median(each) / count for each in zip(*pairs, strict=True))
    return apart, joined, statistics.median(a / b for a, b in pairs)


def main() -> int:
    """Print both tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(SHAPES), default="gpt2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--branches", type=int, nargs="+", default=COUNTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    server = Server(*SHAPES[options.model])
    found: dict[str, dict[str, float]] = {"ms_per_step": {}, "peak_mb": {}, "batched_speed": {}}
    print(f"{'branches':>8}{'ms':>16}{'peak MB':>14}   a branch and step of 32 tokens, one by one")
    for count in sorted(options.branches):
        arrived, tiers = server.mini_batches(1, 32) * count, server.tiers(count)
        one_by_one(server, tiers[:1], arrived[:1])
        taken = 1e3 * one_by_one(server, tiers, arrived) / count
        for tier in tiers:
            tier.update()
        found["ms_per_step"][str(count)] = taken
        found["peak_mb"][str(count)] = peak = _peak_mb()
        print(f"{count:8}{taken:16.1f}{peak:14.0f}", flush=True)
    print(f"{'tokens':>8}{'one by one ms':>16}{'together ms':>14}{'speed':>8}   of 8 branches")
    for tokens in [length for length in options.tokens if length <= server.longest]:
        apart, joined, speed = compare(server, TOGETHER, tokens, options.repeats)
        found["batched_speed"][str(tokens)] = speed
        print(f"{tokens:8}{apart:16.1f}{joined:14.1f}{speed:8.2f}", flush=True)
    rounded = {key: {k: round(v, 2) for k, v in each.items()} for key, each in found.items()}
    print(json.dumps({"model": options.model, **rounded}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
