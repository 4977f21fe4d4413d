"""What a device's turn costs beside its work, and what a run holds, as the fleet grows.

    python -m benchmarks.scale [--sizes 10,100] [--turns 300] [--contestants split,flower]
    python -m benchmarks.scale --sizes 100,10000 --contestants split --sampled 100

Every run is a real one with trivial work: `fedsplit run` (embedded engine, a Llama of two narrow
blocks, one step of 2 x 16 tokens), and beside it Flower's own simulation with plain FedAvg, which
trains the same model unsplit. CPU seconds are those of all processes together; those of a turn are
taken from the end of the first round to the end of the last, less those of an unsplit step alone.

JSON: for each contestant, by fleet size, `cpu_ms_per_turn` beyond the unsplit step,
`first_round_cpu_s` (from the start of the command), `peak_mb` (most that all processes hold
together); `exponent` of a round's CPU in the number of devices; `unsplit_ms`. With `--sampled`, so
many devices of the fleet take part in each round of a split run.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

PLACES = 2
_LOOK_S, _LOOKS_BETWEEN_MEMORY = 0.05, 10
_MB = 2**20
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_DEDUP_LOGS": "0"}


@dataclass
class Found:
    """One run: CPU seconds when each round ended, and the most memory."""

    cpu_s: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    @property
    def round_s(self) -> float:
        """Mean CPU seconds of a round after the first."""
        return (self.cpu_s[-1] - self.cpu_s[0]) / (len(self.cpu_s) - 1)


def write_checkpoint(folder: Path) -> None:
    """Write a Llama of two narrow blocks, with the tokenizer of the model that ships."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from fedsplit.assets import default_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def write_text(file: Path, devices: int) -> None:
    """Write enough short paragraphs for each device to train on."""
    lines = (f"Paragraph {n} of this text counts to {n * n} and stops." for n in range(8 * devices))
    file.write_text("\n\n".join(lines))


def split_command(place: Path, folder: Path, devices: int, rounds: int) -> list[str]:
    """Return the command of a split run."""
    overrides = [
        f"model={place / 'model'}",
        "data=text",
        f"data.path={place / 'text.txt'}",
        "data.partition=iid",
        "data.seq_len=16",
        "strategy.cut=1",
        "train.batch_size=2",
        "train.steps=1",
        "aggregator.fraction_evaluate=0.0",
        f"fleet.devices={devices}",
        f"rounds={rounds}",
        f"evaluate.every={rounds}",
        f"run.concurrency={PLACES}",
        f"output={folder}",
    ]
    return [sys.executable, "-m", "fedsplit.apps", "run", *overrides]


def flower_command(place: Path, folder: Path, devices: int, rounds: int) -> list[str]:
    """Return the command of a run of plain Flower."""
    words = [str(place / "model"), str(folder), str(devices), str(rounds), str(PLACES)]
    return [sys.executable, "-m", "benchmarks._scale_flower", *words]


COMMANDS = {"split": split_command, "flower": flower_command}


def watch(command: Sequence[str], folder: Path, rounds: int, offset: int) -> Found:
    """Run `command` to its end; its folder's metrics.csv has `offset` lines before round 1's."""
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **ENVIRONMENT}
        )
        found, spent, looks = Found(), dict[tuple[int, float], float](), 0
        root = psutil.Process(process.pid)
        while process.poll() is None:
            memory_mb = 0.0
            with suppress(psutil.NoSuchProcess):
                for each in [root, *root.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                        times = each.cpu_times()
                        spent[each.pid, each.create_time()] = times.user + times.system
                        if looks % _LOOKS_BETWEEN_MEMORY == 0:
                            memory_mb += each.memory_full_info().pss / _MB
            found.peak_mb = max(found.peak_mb, memory_mb)
            done = _lines(folder / "metrics.csv") - offset
            found.cpu_s += [sum(spent.values())] * (min(done, rounds) - len(found.cpu_s))
            looks += 1
            time.sleep(_LOOK_S)
    if process.returncode or len(found.cpu_s) < rounds:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()[-2000:]}")
    return found


def _lines(file: Path) -> int:
    with suppress(FileNotFoundError):
        return file.read_text().count("\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="10,100")
    parser.add_argument("--turns", type=int, default=300, help="at least so many are timed")
    parser.add_argument("--contestants", default="split,flower")
    parser.add_argument("--sampled", type=int, help="devices in a round of split runs; else all")
    options = parser.parse_args(arguments)
    if options.sampled is not None and options.contestants != "split":
        parser.error("--sampled: needs --contestants split")
    sizes = [int(size) for size in options.sizes.split(",")]
    report: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="fedsplit-scale-") as name:
        place = Path(name)
        write_checkpoint(place / "model")
        from benchmarks._scale_flower import unsplit_ms

        step_ms = unsplit_ms(str(place / "model"))
        report["unsplit_ms"] = round(step_ms, 2)
        for contestant in options.contestants.split(","):
            runs: dict[int, Found] = {}
            turns = {devices: min(devices, options.sampled or devices) for devices in sizes}
            for devices in sizes:
                folder = place / f"{contestant}-{devices}"
                if contestant == "flower":
                    folder.mkdir()
                write_text(place / "text.txt", devices)
                rounds = 1 + max(2, math.ceil(options.turns / turns[devices]))
                command = COMMANDS[contestant](place, folder, devices, rounds)
                if options.sampled is not None:
                    command.append(f"aggregator.fraction_train={turns[devices] / devices}")
                # A header; of a split run also round 0, if anything was evaluated.
                runs[devices] = watch(command, folder, rounds, 1)
            rows = {
                str(devices): {
                    "cpu_ms_per_turn": round(found.round_s / turns[devices] * 1e3 - step_ms, 2),
                    "first_round_cpu_s": round(found.cpu_s[0], 2),
                    "peak_mb": round(found.peak_mb),
                }
                for devices, found in runs.items()
            }
            for size, row in rows.items():
                print(contestant, size, row, flush=True)
            report[contestant] = rows
            if len(runs) > 1:
                seconds = [found.round_s for found in runs.values()]
                slope = np.polyfit(np.log(list(runs)), np.log(seconds), 1)[0]
                report[f"{contestant}_exponent"] = round(float(slope), 3)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
