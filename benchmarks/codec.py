"""Size and speed of the codecs on activations, beside general-purpose compressors.

    python -m benchmarks.codec [--rounds 40]

Work: what a GPT-2-shaped model (random weights) passes on after 3 blocks for 8 x 128 tokens of
English, fp32 [8, 128, 768], on one core. Each contestant keeps the same top 10 % in 4 bits, and
codes the same positions and levels: `range` is the project's codec, the others take a bitmap and
one byte per level, each compressed on its own. Contestants take turns; medians. MB/s are of fp32
input, for the whole way from tensor to bytes and back, by processor time: all contestants have one
thread, so on a quiet machine this is wall time, and on a busy one it still is what a core can do.
`over entropy` compares all bytes, headers too, with the empirical entropy of positions and levels.

A second table shows other settings on the same tensor, and on the shipped checkpoint's.
"""

import argparse
import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import blosc2
import lz4.block
import numpy as np
import torch
import zstandard
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedModel

from fedsplit.assets import default_checkpoint
from fedsplit.codec import make_codec
from fedsplit.codec.formula import ideal_bits
from fedsplit.codec.packing import Quantised
from fedsplit.codec.topk import TopK
from fedsplit.data.stdlib import docstrings
from fedsplit.errors import FedsplitError

BLOCKS, BATCH, TOKENS = 3, 8, 128
KEEP, BITS = 0.1, 4
FLOORS = {"over_entropy": 1.01, "encode_mb_s": 200.0, "decode_mb_s": 200.0}
AIMS = {"over_entropy": 1.01, "encode_mb_s": 400.0, "decode_mb_s": 400.0}
SETTINGS: dict[str, dict[str, object]] = {
    "bf16": {"name": "bf16"},
    "fp8": {"name": "fp8"},
    "int8": {"name": "int8"},
    "int8, zstd": {"name": "int8", "lossless": "zstd"},
    "top 5 %, 4 bits": {"name": "topk", "keep": 0.05},
    "top 10 %, 4 bits": {"name": "topk"},
    "top 10 %, 4 bits, token scale": {"name": "topk", "scale": "token"},
    "top 20 %, 4 bits": {"name": "topk", "keep": 0.2},
    "top 30 %, 4 bits, as SFT": {
        "name": "topk",
        "keep": 0.3,
        "rounding": "author",
        "clip_percentile": 95,
    },
    "all, 4 bits, token scale": {"name": "topk", "keep": 1, "scale": "token"},
    "rank 16, int8": {"name": "low_rank", "rank": 16, "factors": {"name": "int8"}},
}


@dataclass(frozen=True)
class General:
    """A general-purpose compressor of bytes."""

    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]


def zlib_huffman(data: bytes) -> bytes:
    """Compress by Huffman codes alone, without looking for repetitions."""
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


GENERAL = {
    "zlib, Huffman only": General(zlib_huffman, lambda data: zlib.decompress(data, -15)),
    "zlib -6": General(zlib.compress, zlib.decompress),
    "zstd -1": General(lambda data: zstandard.compress(data, 1), zstandard.decompress),
    "zstd -3": General(lambda data: zstandard.compress(data, 3), zstandard.decompress),
    "lz4": General(lz4.block.compress, lz4.block.decompress),
    "blosc2": General(lambda data: blosc2.compress2(data), lambda data: blosc2.decompress2(data)),
}


@dataclass(frozen=True)
class Contestant:
    """A way from tensor to bytes and back."""

    encode: Callable[[torch.Tensor], list[bytes]]
    decode: Callable[[list[bytes]], torch.Tensor]


def codec_contestant(settings: dict[str, object], shape: torch.Size) -> Contestant:
    """Return the codec that `settings` describe."""
    codec = make_codec(settings, 0)
    return Contestant(
        lambda tensor: [bytes(codec.encode(tensor))],
        lambda parts: codec.decode(parts[0], shape, torch.float32),
    )


def general_contestant(general: General, shape: torch.Size) -> Contestant:
    """Return the same lossy pipeline with a bitmap and level bytes behind it."""
    codec = TopK(keep=KEEP, bits=BITS)
    grids: list[Quantised] = []

    def encode(tensor: torch.Tensor) -> list[bytes]:
        kept = codec.quantise(tensor)
        grids[:] = [kept]
        bitmap = np.zeros(tensor.numel(), dtype=bool)
        bitmap[kept.positions] = True
        parts = (np.packbits(bitmap).tobytes(), kept.symbols.astype(np.uint8).tobytes())
        return [general.compress(part) for part in parts]

    def decode(parts: list[bytes]) -> torch.Tensor:
        bitmap, levels = (np.frombuffer(general.decompress(part), np.uint8) for part in parts)
        symbols = torch.from_numpy(levels.astype(np.int32))
        values = grids[0].grid.magnitudes(symbols >> 1).mul_(1 - 2 * (symbols & 1))
        out = torch.zeros(shape.numel())
        out[torch.from_numpy(np.flatnonzero(np.unpackbits(bitmap, count=out.numel())))] = values
        return out.reshape(shape)

    return Contestant(encode, decode)


@dataclass(frozen=True)
class Result:
    """What was measured of a contestant."""

    n_bytes: int
    error: float
    encode_s: float
    decode_s: float


def measure(
    contestants: dict[str, Contestant], tensor: torch.Tensor, rounds: int
) -> dict[str, Result]:
    """Let the contestants take turns for `rounds` rounds after one to warm up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    last: dict[str, tuple[int, float]] = {}
    for _ in range(rounds + 1):
        for name, contestant in contestants.items():
            start = time.process_time()
            parts = contestant.encode(tensor)
            middle = time.process_time()
            decoded = contestant.decode(parts)
            times[name].append((middle - start, time.process_time() - middle))
            error = (decoded - tensor).square().sum() / tensor.square().sum()
            last[name] = (sum(len(part) for part in parts), error.item())
    return {
        name: Result(
            *last[name],
            statistics.median(first for first, _ in times[name][1:]),
            statistics.median(second for _, second in times[name][1:]),
        )
        for name in contestants
    }


def activations(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return what block `BLOCKS` of `model` passes on."""
    with torch.no_grad():
        hidden: torch.Tensor = model(ids, output_hidden_states=True).hidden_states[BLOCKS]
    return hidden.contiguous()


def token_ids(n: int) -> torch.Tensor:
    """Return English as GPT-2 might see it: words numbered by frequency, [BATCH, TOKENS]."""
    words = " ".join(docstrings()).split()[: 64 * n]
    ranks = {word: i for i, (word, _) in enumerate(_counted(words))}
    return torch.tensor([ranks[word] for word in words[:n]]).reshape(BATCH, TOKENS)


def _counted(words: list[str]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])


def gpt2_activations() -> torch.Tensor:
    """Return activations [8, 128, 768] of a GPT-2 shape with random weights."""
    torch.manual_seed(0)
    # One block more, because the last one's output is given after the final norm.
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=BLOCKS + 1))
    return activations(model.eval(), token_ids(BATCH * TOKENS))


def shipped_activations() -> torch.Tensor | None:
    """Return activations of the shipped checkpoint, if it is there."""
    try:
        folder = default_checkpoint()
    except FedsplitError:
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(" ".join(docstrings()[:400]), verbose=False).input_ids[: BATCH * TOKENS]
    model = AutoModelForCausalLM.from_pretrained(folder)
    return activations(model.eval(), torch.tensor(ids).reshape(BATCH, TOKENS))


def show(title: str, results: dict[str, Result], tensor: torch.Tensor, ideal: float | None) -> None:
    """Print one table."""
    table = Table(title=title)
    for heading in ("coder", "ratio", "bits/element", "over entropy", "error", "encode", "decode"):
        table.add_column(heading, justify="left" if heading == "coder" else "right")
    for name, result in results.items():
        over = "" if ideal is None else f"{8 * result.n_bytes / ideal:.4f}"
        table.add_row(
            name,
            f"{tensor.nbytes / result.n_bytes:.1f}",
            f"{8 * result.n_bytes / tensor.numel():.4f}",
            over,
            f"{result.error:.4f}",
            f"{tensor.nbytes / result.encode_s / 1e6:.0f} MB/s",
            f"{tensor.nbytes / result.decode_s / 1e6:.0f} MB/s",
        )
    Console(width=110).print(table)


def main() -> None:
    """Measure, print, and exit with 1 if a floor is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    tensor = gpt2_activations()
    shape = tensor.shape

    symbols = TopK(keep=KEEP, bits=BITS).quantise(tensor).symbols
    ideal = ideal_bits(np.bincount(symbols), tensor.numel())
    contestants = {"range": codec_contestant({"name": "topk", "keep": KEEP, "bits": BITS}, shape)}
    contestants |= {name: general_contestant(coder, shape) for name, coder in GENERAL.items()}
    results = measure(contestants, tensor, rounds)
    show(f"GPT-2 shape {list(shape)}, top 10 %, 4 bits", results, tensor, ideal)

    for name, other in (("GPT-2 shape", tensor), ("shipped checkpoint", shipped_activations())):
        if other is None:
            print(f"{name}: absent, not measured")
            continue
        codecs = {key: codec_contestant(value, other.shape) for key, value in SETTINGS.items()}
        show(
            f"{name} {list(other.shape)}", measure(codecs, other, max(rounds // 4, 1)), other, None
        )

    ours = results["range"]
    figures = {
        "ratio": tensor.nbytes / ours.n_bytes,
        "over_entropy": 8 * ours.n_bytes / ideal,
        "encode_mb_s": tensor.nbytes / ours.encode_s / 1e6,
        "decode_mb_s": tensor.nbytes / ours.decode_s / 1e6,
    }
    missed = [
        key
        for key, floor in FLOORS.items()
        if (figures[key] > floor if key == "over_entropy" else figures[key] < floor)
    ]
    print(f"aims {AIMS}, floors {FLOORS}, floors missed: {missed or 'none'}")
    print(json.dumps(figures))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
