"""Tiny split training for tests: mini-batches, plain PEFT as the oracle, a cluster of stages.

All of it computes on the CPU, or where `FEDSPLIT_TEST_DEVICE` says, such as ``cuda``.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsplit.data import Batch
from fedsplit.execution import OptimizerSpec, Stage, TurnResult, compute, evaluate_turn, train_turn
from fedsplit.models import ModelSpec, load
from fedsplit.plan import DEVICE, CodecPlan, Route, Segment
from fedsplit.transport import (
    GrpcLink,
    GrpcServer,
    InProcessLink,
    Link,
    OpenRequest,
    ServerLimits,
    TurnBounds,
    new_token,
)

BLOCKS, VOCABULARY, TOKENS = 4, 64, 8
WHERE = os.environ.get("FEDSPLIT_TEST_DEVICE", "cpu")
OPTIMIZER = OptimizerSpec(lr=1e-2, weight_decay=0.1)


def gpt2(dropout: float = 0.0) -> ModelSpec:
    """Return a four-block GPT-2 of a few thousand random weights."""
    sizes = {"n_layer": BLOCKS, "n_embd": 32, "n_head": 4, "n_positions": 16}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return ModelSpec(model_type="gpt2", config=sizes | tokens | drops, r=4, dropout=dropout)


def checkpoint(folder: Path) -> ModelSpec:
    """Return a spec that reads the four-block model saved in `folder`."""
    return ModelSpec(source=str(folder), r=4, alpha=8, target_modules=("q_proj", "v_proj"))


def batches(count: int, seed: int = 0) -> list[Batch]:
    """Return `count` mini-batches of two sequences, the second one padded."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        ids = torch.randint(0, VOCABULARY, (2, TOKENS), generator=draw)
        mask = torch.ones_like(ids)
        mask[1, TOKENS - 1 - index % 3 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        found.append(Batch(inputs, (2 * index, 2 * index + 1)))
    return found


def initial(spec: ModelSpec) -> dict[str, Tensor]:
    """Return the adapters that training starts from; B is not zero, so that A learns at once."""
    draw = torch.Generator().manual_seed(7)
    values = load(spec).adapters(Segment(DEVICE, 0, BLOCKS))
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=draw)
        for name, value in values.items()
    }


def plain_peft(spec: ModelSpec, adapters: Mapping[str, Tensor]) -> Any:
    """Return the unsplit model in PEFT's own wrapper, with `adapters` in place."""
    base = AutoModelForCausalLM.from_pretrained(spec.source)
    config = LoraConfig(
        r=spec.r, lora_alpha=spec.alpha, target_modules=list(spec.target_modules or ())
    )
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, dict(adapters))
    return model.to(WHERE)


def there(batch: Batch) -> dict[str, Tensor]:
    """Return a mini-batch's inputs where `plain_peft` computes."""
    return {name: value.to(WHERE) for name, value in batch.inputs.items()}


def train_plainly(
    model: Any, data: Sequence[Batch], optimizer: OptimizerSpec
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses and adapters of a plain PyTorch loop over the unsplit model."""
    model.train()
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    own = {"momentum": optimizer.momentum} if optimizer.name == "sgd" else {}
    steps = kinds[optimizer.name](
        [item for item in model.parameters() if item.requires_grad],
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        **own,
    )
    losses = []
    for batch in data:
        loss = model(**there(batch)).loss
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    return losses, {n: value.cpu() for n, value in get_peft_model_state_dict(model).items()}


class Cluster:
    """A stage for each server tier, reached by links of one kind ("in-process" or "grpc")."""

    def __init__(
        self, spec: ModelSpec, kind: str = "in-process", limits: ServerLimits | None = None
    ) -> None:
        self.spec = spec
        self._limits = limits
        self._kind = kind
        self._folder = tempfile.TemporaryDirectory()
        self._servers: dict[str, GrpcServer] = {}
        self._stages: dict[str, Stage] = {}

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.stop()
        self._folder.cleanup()

    def stage(self, tier: str) -> Stage:
        """Return the stage of `tier`, which holds the whole model and so serves any cut."""
        if tier not in self._stages:
            self._stages[tier] = Stage(compute(lambda: load(self.spec, device=WHERE)), self._limits)
        return self._stages[tier]

    def link(self, tier: str) -> Link:
        """Return a fresh link to `tier`."""
        if self._kind == "in-process":
            return InProcessLink(self.stage(tier))
        if tier not in self._servers:
            address = f"unix:{self._folder.name}/{tier}"
            self._servers[tier] = GrpcServer(self.stage(tier), address, limits=self._limits)
        return GrpcLink(self._servers[tier].address, connect_timeout_s=30)

    def open(
        self,
        route: Route,
        adapters: Mapping[str, Tensor],
        optimizer: OptimizerSpec | None = OPTIMIZER,
        seed: int = 0,
        codec: CodecPlan | None = None,
        fetched: Mapping[str, Tensor] | None = None,
        supply: bool = True,
        bounds: TurnBounds | None = None,
    ) -> dict[str, str]:
        """Open a turn on every server tier of `route`; return its token on each.

        `fetched` are the adapters that the device gets over its link. Without `supply` the tiers
        wait for theirs.
        """
        servers = [
            (position, segment.tier)
            for position, segment in enumerate(route.segments)
            if segment.tier != DEVICE
        ]
        tokens: dict[str, str] = {}
        downstream: tuple[Link, str] | None = None
        for position, tier in reversed(servers):
            tokens[tier] = new_token()
            train, on_link = optimizer is not None, fetched is not None and position == 1
            request = OpenRequest(
                tokens[tier],
                route,
                position,
                codec or CodecPlan(),
                seed,
                train,
                on_link,
                bounds or TurnBounds(),
            )
            stage = self.stage(tier)
            stage.open_turn(request, optimizer=optimizer, downstream=downstream)
            if supply:
                stage.supply(tokens[tier], adapters, fetched if on_link else None)
            downstream = (self.link(tier), tokens[tier])
        return tokens

    def entrance(self, route: Route, tokens: Mapping[str, str]) -> dict[str, Any]:
        """Return the link and token that the device of `route` needs."""
        if len(route.segments) == 1:
            return {}
        first = route.segments[1].tier
        return {"link": self.link(first), "token": tokens[first]}

    def train(
        self,
        route: Route,
        data: Sequence[Batch],
        adapters: Mapping[str, Tensor],
        optimizer: OptimizerSpec = OPTIMIZER,
        seed: int = 0,
        codec: CodecPlan | None = None,
    ) -> tuple[TurnResult, dict[str, Tensor]]:
        """Run a turn; return the device's result and the adapters of all tiers together."""
        bounds = TurnBounds(steps=len(data))
        tokens = self.open(route, adapters, optimizer, seed, codec, bounds=bounds)
        result = train_turn(
            compute(lambda: load(self.spec, route.on(DEVICE), WHERE)),
            route,
            data,
            adapters=adapters,
            optimizer=optimizer,
            seed=seed,
            steps=len(data),
            codec=codec,
            **self.entrance(route, tokens),
        )
        complete = dict(result.adapters)
        for tier, token in tokens.items():
            complete |= self.stage(tier).adapters(token)
            self.stage(tier).close_turn(token)
        return result, complete

    def evaluate(
        self, route: Route, data: Sequence[Batch], adapters: Mapping[str, Tensor]
    ) -> TurnResult:
        """Evaluate on `data`."""
        tokens = self.open(route, adapters, optimizer=None)
        return evaluate_turn(
            compute(lambda: load(self.spec, route.on(DEVICE), WHERE)),
            route,
            data,
            adapters=adapters,
            seed=0,
            **self.entrance(route, tokens),
        )


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return the names that only one has, or whose values differ in any bit that counts."""
    names = sorted(found.keys() | expected.keys())
    return [
        name
        for name in names
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    ]
