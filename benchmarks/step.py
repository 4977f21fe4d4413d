"""Time one training step, split over two processes, against the plain PEFT loop.

    python -m benchmarks.step [--rounds 6] [--steps 3]

Work: the shape of GPT-2 small (random weights), LoRA of rank 8 on c_attn, AdamW, batch 4 x 128
tokens, fp32, cut after 3 blocks. Contestants live in processes of their own, 2 threads each, and
take turns of a few steps; the table gives medians over all steps. Every process gets the same
allocator and OpenMP settings (`ENVIRONMENT`), the plain loop too.

- unsplit: one process, transformers + PEFT, a loop as a user writes it
- split: a device process and a server process, a gRPC link over a unix socket
- pipelining: torch.distributed.pipelining, two processes, gloo

Bytes on the wire are counted by a relay between the two processes, during the warm-up.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CUT, BATCH, TOKENS, THREADS, WARM_UP = 3, 4, 128, 2, 2
FLOORS = {"speed": 0.89, "wire": 1.01, "device_peak_mb": 1000.0}
AIMS = {"speed": 0.97, "wire": 1.01, "device_peak_mb": 900.0}
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(THREADS),
    "OMP_WAIT_POLICY": "PASSIVE",  # a process that waits for another must not spin on its cores
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_TOP_PAD_": str(1 << 20),
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
}


# --- contestants: each answers a line "N" on its standard input with N steps -------------------


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
    with GrpcServer(stage, address):
        _say(ready=True)
        sys.stdin.read()
    _say(peak_mb=_peak_mb())


def device(relayed: str, direct: str, warm_up_token: str, token: str) -> None:
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
        "optimizer": OptimizerSpec(lr=1e-4),
        "seed": 0,
    }
    warm_up = train_turn(
        model, route, [batch] * WARM_UP, link=GrpcLink(relayed), token=warm_up_token, **common
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
    train_turn(model, route, batches(), link=GrpcLink(direct), token=token, **common)
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


# --- the parent: starts the contestants, lets them take turns, counts bytes --------------------


class _Child:
    """A contestant's process."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step", "--role", *arguments],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> dict[str, Any]:
        """Return the child's next message."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._arguments}: ended before it answered")
        message: dict[str, Any] = json.loads(line)
        return message

    def tell(self, steps: int) -> None:
        """Ask for `steps` steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()

    def finish(self) -> float:
        """End the child and return its peak memory in MB."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = float(self.hear()["peak_mb"])
        self._process.wait(timeout=60)
        return peak

    def kill(self) -> None:
        """End the child if it still runs."""
        self._process.kill()


class _Relay:
    """Passes bytes between a unix socket of its own and another, and counts them."""

    def __init__(self, path: str, onward: str) -> None:
        self.count = 0
        self._onward = onward
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._onward)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
                self.count += len(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # an end hung up


def main() -> int:
    """Run the comparison and print the table; return 1 if a floor is missed."""
    from fedsplit.transport import new_token

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="steps in a burst")
    options = parser.parse_args()
    children: list[_Child] = []

    def child(*arguments: str) -> _Child:
        children.append(_Child(*arguments))
        return children[-1]

    with tempfile.TemporaryDirectory() as folder:
        try:
            near, far = f"{folder}/near", f"{folder}/far"
            tokens = [new_token(), new_token()]
            serving = child("server", f"unix:{far}", *tokens)
            serving.hear()
            relay = _Relay(near, far)
            split = child("device", f"unix:{near}", f"unix:{far}", *tokens)
            payload = split.hear()["payload_bytes"]
            wire = relay.count / WARM_UP
            plain = child("unsplit")
            pipes = [child("pipelining", rank, f"{folder}/store") for rank in "01"]
            for other in (plain, *pipes):
                other.hear()
            seconds = _take_turns(
                {"unsplit": [plain], "split": [split], "pipelining": pipes}, options
            )
            peaks = {
                "unsplit": [plain.finish()],
                "split": [split.finish(), serving.finish()],
                "pipelining": [pipe.finish() for pipe in pipes],
            }
        finally:
            for each in children:
                each.kill()
    return _report(seconds, peaks, wire, payload)


def _take_turns(
    contestants: dict[str, list[_Child]], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Let the contestants run in turns; return the seconds of every step but the warm-up's."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.rounds + 1):
        for name, parts in contestants.items():
            for part in parts:
                part.tell(options.steps if turn else WARM_UP)
            measured = [part.hear()["seconds"] for part in parts][-1]
            if turn:
                seconds[name] += measured
    return seconds


def _report(
    seconds: dict[str, list[float]], peaks: dict[str, list[float]], wire: float, payload: float
) -> int:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{'':12}{'s/step':>8}{'x unsplit':>11}   peak MB (device + server)")
    for name, median in medians.items():
        memory = " + ".join(f"{peak:,.0f}" for peak in peaks[name])
        print(f"{name:12}{median:8.3f}{median / medians['unsplit']:11.3f}   {memory}")
    found = {
        "speed": medians["unsplit"] / medians["split"],
        "wire": wire / payload,
        "device_peak_mb": peaks["split"][0],
    }
    missed = []
    for name, value in found.items():
        better = value >= FLOORS[name] if name == "speed" else value <= FLOORS[name]
        print(f"{name}: {value:.4g} (aim {AIMS[name]:g}, floor {FLOORS[name]:g})")
        if not better:
            missed.append(name)
    if missed:
        print(f"floor missed: {', '.join(missed)}")
    print(
        json.dumps(
            {
                "split_over_unsplit_speed": round(found["speed"], 4),
                "pipelining_over_unsplit_speed": round(
                    medians["unsplit"] / medians["pipelining"], 4
                ),
                "device_peak_mb": round(found["device_peak_mb"], 1),
                "server_peak_mb": round(peaks["split"][1], 1),
                "bytes_per_step": round(wire),
                "payload_bytes": round(payload),
            }
        )
    )
    return 1 if missed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--role"]:
        globals()[sys.argv[2]](*sys.argv[3:])
    else:
        sys.exit(main())
