"""Measure how much memory a device needs that holds the first blocks only.

    python -m benchmarks.memory

A checkpoint of the shape of GPT-2 small (random weights, saved in shards) is made in a temporary
folder. One process per case loads what its tier holds and makes forward and backward passes of
LoRA training (rank 8, batch 4 x 128, fp32): the device of a route cut after 1, 2 and 4 blocks, and
a device with the whole model. Peaks are the kernel's high-water mark of resident memory (VmHWM),
libraries included. Each process also reports the weights that it holds, and its peak before the
first step: loading must not have touched weights that belong to the server.

Then the same for a checkpoint of the shape of Llama 3.2 1B in bfloat16, cut after 2 blocks, batch
1 x 128: as it is, and in 4 bits (nf4, where bitsandbytes is installed). Beyond the libraries the
device may take 1.25 times its segment, and in 4 bits half of that same segment; loading may take
1.1 times what is held then.
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BLOCKS, BATCH, TOKENS, STEPS = 12, 4, 128, 2
CUTS = (1, 2, 4)
SHARD = "50MB"
LLAMA_CUT, LLAMA_BLOCKS = 2, 16
LLAMA_BOUNDS = {"none": 1.25, "nf4": 0.5}
"""Peak beyond the libraries, in sizes of the bfloat16 segment, by how it is quantised."""
LLAMA_LOADING = 1.1
"""Peak of loading beyond the libraries, in sizes of what is held at its end."""
TOLERANCE_MB = 60.0
"""Memory that loading may take beyond the weights held and the libraries."""


def make_checkpoint(folder: Path) -> None:
    """Save a model of the shape of GPT-2 small with random weights, in shards."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder, max_shard_size=SHARD)


def make_llama(folder: Path) -> None:
    """Save a model of the shape of Llama 3.2 1B with random weights in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=LLAMA_BLOCKS,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data.uniform_(-0.03, 0.03, generator=generator)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="1GB")


def measure(folder: str, cut: int, quantize: str | None) -> dict[str, float]:
    """Load and train one tier in this process; return memory in MB (10^6 bytes)."""
    import torch

    from fedsplit.models import Boundary, ModelSpec, Output, load
    from fedsplit.models.anatomy import anatomy
    from fedsplit.plan import Route

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    spec = ModelSpec(source=folder, quantize=quantize)
    config = spec.load_config()
    blocks, batch = int(config.num_hidden_layers), BATCH if config.model_type == "gpt2" else 1
    route = Route.device_only(blocks) if cut == blocks else Route.two_tier(blocks, cut)
    segment = route.segments[0]
    anatomy(config, spec.task)
    if quantize is not None:  # what a library takes once is not the model's
        warm = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
        bnb = importlib.import_module("bitsandbytes")
        bnb.functional.quantize_4bit(warm.weight.detach(), quant_type="nf4")
    libraries = peak_mb()
    model = load(spec, [segment]).train()
    loaded = peak_mb()
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 50257, (batch, TOKENS), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        result = model.run(segment, inputs)
        if isinstance(result, Output):
            result.loss.backward()
        elif isinstance(result, Boundary):
            result.backward([torch.ones_like(tensor) for tensor in result.tensors])
    return {
        "libraries_mb": libraries,
        "loaded_mb": loaded,
        "weights_mb": model.held_bytes / 1e6,
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    """Return the high-water mark of this process's resident memory, in MB (10^6 bytes)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def measure_apart(folder: Path, cut: int, quantize: str | None = None) -> dict[str, float]:
    """Return `measure` of a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory",
        "--folder",
        str(folder),
        "--cut",
        str(cut),
        *(["--quantize", quantize] if quantize else []),
    ]
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=quiet)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> int:
    """Run the benchmark; return 1 if loading held weights that are not the device's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--cut", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--quantize", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(measure(options.folder, options.cut, options.quantize)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        make_checkpoint(Path(name))
        found = {cut: measure_apart(Path(name), cut) for cut in (*CUTS, BLOCKS)}
    with tempfile.TemporaryDirectory() as name:
        make_llama(Path(name))
        llama = {"none": measure_apart(Path(name), LLAMA_CUT)}
        if importlib.util.find_spec("bitsandbytes") is not None:
            llama["nf4"] = measure_apart(Path(name), LLAMA_CUT, "nf4")
    segment_mb = llama["none"]["weights_mb"]
    over = {kind: (c["peak_mb"] - c["libraries_mb"]) / segment_mb for kind, c in llama.items()}
    print(f"{'device holds':>16} {'libraries':>10} {'weights':>9} {'loaded':>9} {'peak MB':>9}")
    for cut, case in found.items():
        label = "whole model" if cut == BLOCKS else f"blocks 0..{cut - 1}"
        print(
            f"{label:>16} {case['libraries_mb']:10.0f} {case['weights_mb']:9.0f} "
            f"{case['loaded_mb']:9.0f} {case['peak_mb']:9.0f}"
        )
    excess = {
        cut: case["loaded_mb"] - case["libraries_mb"] - case["weights_mb"]
        for cut, case in found.items()
    }
    for kind, case in llama.items():
        print(
            f"{'Llama 1B ' + kind:>16} {case['libraries_mb']:10.0f} {case['weights_mb']:9.0f} "
            f"{case['loaded_mb']:9.0f} {case['peak_mb']:9.0f}"
        )
    loading = {
        kind: (case["loaded_mb"] - case["libraries_mb"]) / case["weights_mb"]
        for kind, case in llama.items()
    }
    summary: dict[str, Any] = {
        "llama_segment_mb": round(segment_mb, 1),
        "llama_peak_in_segments": {kind: round(value, 3) for kind, value in over.items()},
        "llama_loading_in_held": {kind: round(value, 3) for kind, value in loading.items()},
        "device_peak_mb": {str(cut): round(found[cut]["peak_mb"], 1) for cut in CUTS},
        "whole_peak_mb": round(found[BLOCKS]["peak_mb"], 1),
        "loading_excess_mb": {str(cut): round(value, 1) for cut, value in excess.items()},
    }
    print(json.dumps(summary))
    heavy = any(value > LLAMA_BOUNDS[kind] for kind, value in over.items())
    heavy |= any(value > LLAMA_LOADING for value in loading.values())
    return int(heavy or any(excess[cut] > TOLERANCE_MB for cut in CUTS))


if __name__ == "__main__":
    sys.exit(main())
