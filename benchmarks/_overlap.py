"""What micro-batches under way at once are worth: device and server, one process and thread each.

    python -m benchmarks._overlap [--rounds 5] [--steps 2]

GPT-2-small's shape and a mini-batch of 4 x 128 tokens, as in `benchmarks.step`, as one mini-batch,
in 2 and in 4; cut after 3 and after 6 blocks. All take turns, a turn of a few updates each;
`overlap_speed` is the median, over rounds, of the time in one piece over that in pieces of the same
round. It needs two idle cores: `overlap_limit` is the same from the CPU seconds of either end, as
the timeline of a round has it, which hold on a busy machine too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

CUTS, PIECES = (3, 6), (1, 2, 4)
BATCH, TOKENS = 4, 128


def _parts() -> tuple[Any, Any]:
    import torch

    from fedsplit.models import ModelSpec
    from fedsplit.plan import Route

    torch.set_num_threads(1)
    spec = ModelSpec(model_type="gpt2", r=8, alpha=16, target_modules=("c_attn",))
    return spec, {cut: Route.two_tier(12, cut) for cut in CUTS}


def _optimizer(pieces: int) -> Any:
    from fedsplit.execution import OptimizerSpec

    return OptimizerSpec(lr=1e-4, accumulate=pieces, overlap=min(2, pieces))


def server(address: str) -> None:
    """Serve turns; each line "cut pieces token" opens one."""
    from fedsplit.execution import Stage
    from fedsplit.models import load
    from fedsplit.transport import GrpcServer, OpenRequest

    spec, routes = _parts()
    model = load(spec, [routes[min(CUTS)].segments[1]])
    stage = Stage(model)
    with GrpcServer(stage, address, ping_s=10.0):
        print("ready", flush=True)
        for line in sys.stdin:
            cut, pieces, token = line.split()
            route = routes[int(cut)]
            adapters = model.adapters(route.segments[1])
            request = OpenRequest(token, route, 1)
            stage.open_turn(request, adapters, _optimizer(int(pieces)))
            print("open", flush=True)


def device(address: str) -> None:
    """Run turns; each line "cut pieces token updates" is one, answered with its seconds."""
    import torch

    from fedsplit.data import Batch
    from fedsplit.execution import train_turn
    from fedsplit.models import load
    from fedsplit.transport import GrpcLink

    spec, routes = _parts()
    model = load(spec, [routes[max(CUTS)].segments[0]])
    torch.manual_seed(0)
    whole = torch.randint(0, 50257, (BATCH, TOKENS))
    print("ready", flush=True)
    for line in sys.stdin:
        cut, pieces, token, updates = line.split()
        data = [
            Batch(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids},
                tuple(range(len(ids))),
            )
            for ids in whole.chunk(int(pieces))
        ]
        route = routes[int(cut)]
        started = time.perf_counter()
        train_turn(
            model,
            route,
            data * int(updates),
            adapters=model.adapters(route.segments[0]),
            optimizer=_optimizer(int(pieces)),
            seed=0,
            link=GrpcLink(address, connect_timeout_s=120, ping_s=10.0),
            token=token,
        )
        print((time.perf_counter() - started) / int(updates), flush=True)


class _Process:
    """One end, in a process of its own."""

    def __init__(self, role: str, address: str) -> None:
        from benchmarks.step import ENVIRONMENT

        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._overlap", "--role", role, address],
            env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, *words: object) -> str:
        """Say a line, if any; return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if words:
            self._process.stdin.write(" ".join(map(str, words)) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("an end of the link stopped")
        return answer

    def cpu_s(self) -> float:
        """Return the CPU seconds used so far."""
        with open(f"/proc/{self._process.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def overlap(rounds: int, updates: int) -> dict[str, Any]:
    """Return `overlap_speed` and `overlap_limit` by cut and number of pieces."""
    from fedsplit.transport import new_token

    kinds = [(cut, pieces) for cut in CUTS for pieces in PIECES]
    seconds: dict[tuple[int, int], list[float]] = {kind: [] for kind in kinds}
    cpu: dict[tuple[int, int], list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with (
        tempfile.TemporaryDirectory() as folder,
        _Process("server", f"unix:{folder}/link") as far,
        _Process("device", f"unix:{folder}/link") as near,
    ):
        far.ask(), near.ask()
        for number in range(rounds + 1):
            for kind in kinds:
                token = new_token()
                far.ask(*kind, token)
                before = near.cpu_s(), far.cpu_s()
                taken = float(near.ask(*kind, token, updates))
                if number:  # the first warms up
                    seconds[kind].append(taken)
                    after = near.cpu_s(), far.cpu_s()
                    used = [(b - a) / updates for a, b in zip(before, after, strict=True)]
                    cpu[kind].append((used[0], used[1]))
    return {
        "overlap_speed": _by_cut(lambda cut, m: _ratio(seconds[cut, 1], seconds[cut, m])),
        "overlap_limit": _by_cut(lambda cut, m: _limit(cpu[cut, 1], cpu[cut, m], m)),
    }


def _by_cut(value: Any) -> dict[str, dict[str, float]]:
    return {
        str(cut): {str(pieces): round(value(cut, pieces), 3) for pieces in PIECES[1:]}
        for cut in CUTS
    }


def _ratio(whole: Sequence[float], pieces: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(whole, pieces, strict=True))


def _limit(
    whole: Sequence[tuple[float, float]], pieces: Sequence[tuple[float, float]], count: int
) -> float:
    """Return by how much an update is faster if all ends compute whenever they can.

    One after the other takes what both ends compute. In pieces, the end that has more to do never
    waits, but for the first piece's way to it and the last one's way back: one piece of the other.
    """
    near, far = (statistics.median(used) for used in zip(*pieces, strict=True))
    serial = statistics.median(sum(used) for used in whole)
    return serial / (max(near, far) + min(near, far) / count)


def main() -> int:
    """Print the table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="updates in a turn")
    parser.add_argument("--role", choices=("server", "device"), help=argparse.SUPPRESS)
    parser.add_argument("address", nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        {"server": server, "device": device}[options.role](options.address)
        return 0
    found = overlap(options.rounds, options.steps)
    print(f"{'cut':>4}{'pieces':>8}{'speed':>8}{'limit':>8}")
    for cut, speeds in found["overlap_speed"].items():
        for pieces, speed in speeds.items():
            print(f"{cut:>4}{pieces:>8}{speed:8.3f}{found['overlap_limit'][cut][pieces]:8.3f}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
