"""Time one training step, split over two processes, against the plain PEFT loop.

    python -m benchmarks.step [--rounds 6] [--steps 3]

Work: the shape of GPT-2 small (random weights), LoRA of rank 8 on c_attn, AdamW, batch 4 x 128
tokens, fp32, cut after 3 blocks. Contestants live in processes of their own, 2 threads each, and
take turns of a few steps; the table gives medians over all steps. Every process gets the same
allocator and OpenMP settings (`ENVIRONMENT`), the plain loop too.

- unsplit: one process, transformers + PEFT, a loop as a user writes it
- split: a device process and a server process, a gRPC link over a unix socket
- checkpointing: the same, but the device computes its blocks again in the backward pass
- two devices: twice the device process, one server; steps of both together
- pipelining: torch.distributed.pipelining, two processes, gloo

`overlap_speed` is what several mini-batches under way at once gain, see `benchmarks._overlap`.
`fixed_ms` is what a step of a tiny model costs beyond the plain loop (CPU), without a link.

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
from dataclasses import dataclass
from typing import Any

from benchmarks._contestants import THREADS, WARM_UP
from benchmarks._overlap import overlap

AIMS = {
    "speed": 0.97,
    "checkpointing_speed": 0.89,
    "wire": 1.01,
    "device_peak_mb": 900.0,
    "checkpointing_peak_mb": 900.0,
}
FLOORS = {**AIMS, "speed": 0.89, "checkpointing_speed": 0.81, "device_peak_mb": 1000.0}
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


class _Child:
    """A contestant's process."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._contestants", *arguments],
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


@dataclass(frozen=True)
class Measured:
    """Seconds of steps and peak memory (MB) of each contestant's processes; bytes of a split step.

    Of two devices, a step is one of both.
    """

    seconds: dict[str, list[float]]
    peaks: dict[str, list[float]]
    wire: float
    payload: float

    @property
    def step_s(self) -> dict[str, float]:
        """Median seconds of a device's step."""
        medians = {name: statistics.median(times) for name, times in self.seconds.items()}
        medians["two devices"] /= 2  # they train side by side
        return medians

    def table(self) -> str:
        """Return a row for each contestant."""
        rows = [f"{'':14}{'s/step':>8}{'x unsplit':>11}   peak MB (device + server)"]
        for name, median in self.step_s.items():
            memory = " + ".join(f"{peak:,.0f}" for peak in self.peaks[name])
            rows.append(f"{name:14}{median:8.3f}{median / self.step_s['unsplit']:11.3f}   {memory}")
        return "\n".join(rows)


def main() -> int:
    """Run the comparison and print the table; return 1 if a floor is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3, help="steps in a burst")
    options = parser.parse_args()
    return _report(measure(options.rounds, options.steps), overlap(options.rounds, options.steps))


def measure(rounds: int, steps: int) -> Measured:
    """Let all contestants take turns, `rounds` bursts of so many steps each."""
    from fedsplit.transport import new_token

    children: list[_Child] = []

    def child(*arguments: str) -> _Child:
        children.append(_Child(*arguments))
        return children[-1]

    with tempfile.TemporaryDirectory() as folder:
        try:
            near, far = f"{folder}/near", f"{folder}/far"
            tokens = [new_token() for _ in range(8)]
            serving = child("server", f"unix:{far}", *tokens)
            serving.hear()
            relay = _Relay(near, far)
            split = child("device", f"unix:{near}", f"unix:{far}", *tokens[:2])
            payload = split.hear()["payload_bytes"]
            wire = relay.count / WARM_UP
            direct = ["device", *[f"unix:{far}"] * 2]
            two = [child(*direct, *tokens[i : i + 2]) for i in (2, 4)]
            again = child(*direct, *tokens[6:], "checkpointing")
            for each in (*two, again):
                each.hear()
            plain = child("unsplit")
            pipes = [child("pipelining", rank, f"{folder}/store") for rank in "01"]
            for other in (plain, *pipes):
                other.hear()
            seconds = _take_turns(
                {
                    "unsplit": [plain],
                    "split": [split],
                    "checkpointing": [again],
                    "two devices": two,
                    "pipelining": pipes,
                },
                rounds,
                steps,
            )
            peaks = {
                "unsplit": [plain.finish()],
                "checkpointing": [again.finish()],
                "two devices": [each.finish() for each in two],
                "split": [split.finish(), serving.finish()],
                "pipelining": [pipe.finish() for pipe in pipes],
            }
        finally:
            for each in children:
                each.kill()
    return Measured(seconds, peaks, wire, payload)


def _take_turns(
    contestants: dict[str, list[_Child]], rounds: int, steps: int
) -> dict[str, list[float]]:
    """Let the contestants run in turns; return the seconds of every step but the warm-up's."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, parts in contestants.items():
            for part in parts:
                part.tell(steps if turn else WARM_UP)
            measured = [part.hear()["seconds"] for part in parts][-1]
            if turn:
                seconds[name] += measured
    return seconds


def _report(measured: Measured, overlapped: dict[str, Any]) -> int:
    from benchmarks._fixed import fixed_ms

    medians, peaks = measured.step_s, measured.peaks
    print(measured.table())
    found = {
        "speed": medians["unsplit"] / medians["split"],
        "checkpointing_speed": medians["unsplit"] / medians["checkpointing"],
        "wire": measured.wire / measured.payload,
        "device_peak_mb": peaks["split"][0],
        "checkpointing_peak_mb": peaks["checkpointing"][0],
    }
    fixed = fixed_ms()
    missed = []
    for name, value in found.items():
        better = value >= FLOORS[name] if name.endswith("speed") else value <= FLOORS[name]
        print(f"{name}: {value:.4g} (aim {AIMS[name]:g}, floor {FLOORS[name]:g})")
        if not better:
            missed.append(name)
    if missed:
        print(f"floor missed: {', '.join(missed)}")
    print(
        json.dumps(
            {
                "split_over_unsplit_speed": round(found["speed"], 4),
                "checkpointing_over_unsplit_speed": round(found["checkpointing_speed"], 4),
                "pipelining_over_unsplit_speed": round(
                    medians["unsplit"] / medians["pipelining"], 4
                ),
                "two_devices_over_unsplit": round(medians["unsplit"] / medians["two devices"], 4),
                **overlapped,
                "fixed_ms": round(fixed, 2),
                "device_peak_mb": round(found["device_peak_mb"], 1),
                "checkpointing_device_peak_mb": round(found["checkpointing_peak_mb"], 1),
                "server_peak_mb": round(peaks["split"][1], 1),
                "bytes_per_step": round(measured.wire),
                "payload_bytes": round(measured.payload),
            }
        )
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
