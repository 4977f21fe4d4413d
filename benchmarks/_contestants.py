"""The contestants of `benchmarks.step`, each a process that runs steps as its parent asks.

    python -m benchmarks._contestants NAME [ARGUMENT ...]

Each answers a line "N" on its standard input with the seconds of N steps, and at last with its peak
memory; every message is a line of JSON.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CUT, BATCH, TOKENS, THREADS, WARM_UP = 3, 4, 128, 2, 2


def _say(**message: object) -> None:
    print(json.dumps(message), flush=True)


def _peak_mb() -> float:
    """Return the largest resident size so far of this process, in MB of 2^20 bytes."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _bursts(step: Callable[[], None]) -> None:
    """Obey the parent: time `step` in bursts until the input ends."""
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        _say(seconds=seconds)
    _say(peak_mb=_peak_mb())


def _inputs() -> dict[str, Any]:
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    ids = torch.randint(0, 50257, (BATCH, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _plain_peft_model() -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
    return get_peft_model(GPT2LMHeadModel(GPT2Config(use_cache=False)), config).train()


def _adamw(model: Any) -> Any:
    import torch

    return torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-4)


def unsplit() -> None:
    """Run the plain PEFT loop."""
    inputs = _inputs()
    model = _plain_peft_model()
    optimizer = _adamw(model)
    _say(ready=True)

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _bursts(step)


def _split_parts() -> tuple[Any, Any]:
    from fedsplit.models import ModelSpec
    from fedsplit.plan import Route

    spec = ModelSpec(model_type="gpt2", r=8, alpha=16, target_modules=("c_attn",))
    return spec, Route.two_tier(12, CUT)


def server(address: str, *tokens: str) -> None:
    """Serve the blocks after the cut."""
    import torch

    from fedsplit.execution import OptimizerSpec, Stage
    from fedsplit.models import load
    from fedsplit.transport import GrpcServer, OpenRequest

    torch.set_num_threads(THREADS)
    spec, route = _split_parts()
    segment = route.segments[1]
    model = load(spec, [segment])
    stage = Stage(model)
    adapters = model.adapters(segment)
    for token in tokens:
        stage.open_turn(OpenRequest(token, route, 1), adapters, OptimizerSpec(lr=1e-4))
    with GrpcServer(stage, address, ping_s=10.0):
        _say(ready=True)
        sys.stdin.read()
    _say(peak_mb=_peak_mb())


def device(
    relayed: str, direct: str, warm_up_token: str, token: str, checkpointing: str = ""
) -> None:
    """Train the blocks before the cut: a relayed warm-up turn, then a direct one."""
    inputs = _inputs()

    from fedsplit.data import Batch
    from fedsplit.execution import OptimizerSpec, train_turn
    from fedsplit.models import load
    from fedsplit.transport import GrpcLink

    spec, route = _split_parts()
    segment = route.segments[0]
    model = load(spec, [segment])
    batch = Batch(inputs, tuple(range(BATCH)))
    common: dict[str, Any] = {
        "adapters": model.adapters(segment),
        "optimizer": OptimizerSpec(lr=1e-4, checkpointing=bool(checkpointing)),
        "seed": 0,
    }
    warm_up = train_turn(
        model,
        route,
        [batch] * WARM_UP,
        link=GrpcLink(relayed, connect_timeout_s=120, ping_s=10.0),
        token=warm_up_token,
        **common,
    )
    stats = warm_up.stats
    payload = (stats.up_payload_bytes + stats.down_payload_bytes) / WARM_UP
    _say(ready=True, payload_bytes=payload)

    def batches() -> Iterator[Batch]:
        for line in sys.stdin:
            seconds.clear()
            for _ in range(int(line)):
                started = time.perf_counter()
                yield batch
                seconds.append(time.perf_counter() - started)
            _say(seconds=seconds)

    seconds: list[float] = []
    train_turn(
        model,
        route,
        batches(),
        link=GrpcLink(direct, connect_timeout_s=120, ping_s=10.0),
        token=token,
        **common,
    )
    _say(peak_mb=_peak_mb())


def pipelining(rank: str, store: str) -> None:
    """Run one of two stages of torch.distributed.pipelining; both obey the parent."""
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    inputs = _inputs()
    dist.init_process_group("gloo", f"file://{store}", rank=int(rank), world_size=2)

    class First(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            body = model.transformer
            self.wte, self.wpe, self.drop, self.blocks = body.wte, body.wpe, body.drop, body.h[:CUT]

        def forward(self, ids: Tensor) -> Tensor:
            hidden: Tensor = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])))
            for block in self.blocks:
                hidden = block(hidden)
            return hidden

    class Last(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            body = model.transformer
            self.blocks, self.norm, self.head = body.h[CUT:], body.ln_f, model.lm_head

        def forward(self, hidden: Tensor) -> Tensor:
            for block in self.blocks:
                hidden = block(hidden)
            logits: Tensor = self.head(self.norm(hidden))
            return logits

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    part = (First if rank == "0" else Last)(_plain_peft_model().base_model.model)
    optimizer = _adamw(part)
    stage = PipelineStage(part, int(rank), 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=1, loss_fn=loss)
    _say(ready=True)

    def step() -> None:
        if rank == "0":
            schedule.step(inputs["input_ids"])
        else:
            schedule.step(target=inputs["labels"])
        optimizer.step()
        optimizer.zero_grad()

    _bursts(step)
    dist.destroy_process_group()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
