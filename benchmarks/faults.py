"""Faults in the middle of a round: who notices, how soon, and what is lost.

    python -m benchmarks.faults [--faults 30] [--seed 0]

Real processes on loopback TCP: the server's stages here, two edges and four devices as processes
that run the client app, one process for every Flower message, as a SuperNode does it. Flower itself
is left out: a process that dies never answers, which is the worst case. Each fault strikes one
node at a drawn phase of its work (before its model is loaded, between two mini-batches, after its
last one) in training or evaluation:

    kill       SIGKILL
    freeze     SIGSTOP, connections stay open
    cut        the node runs on, but none of its bytes arrive any more, in either direction
    reset      its connections end as if the other machine had forgotten them
    malformed  it answers nothing, sends noise on the link, or answers nonsense

A node may also join in the middle of a round: it says that it is device 0, or nonsense, or nothing.
The other branches must end with exactly the numbers of an undisturbed round.

One fault of ten befalls a real ``fedsplit run`` in the middle of a round: its server is killed, or
killed while it writes a checkpoint, or can write nothing more (a full disk); the process that all
are forked from is killed, or the command itself; or the same command is started beside it. Nothing
may be left running, and the same command must go on from the last checkpoint to the adapters of a
run that was never disturbed; a second command is refused, and the first goes on.

JSON: `injected` faults, rounds `survived`, spared branches `lost` or changed, `hangs`, `orphans`
(processes left ten seconds after), `detect_s_max`: seconds until a node's fault was noticed.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fedsplit.apps.launch.flower_tools import free_ports
from flwr.supercore.task_identity import TaskIdentity

from benchmarks._faults import DEVICES, EDGES, JOINER, Fault, ProcessGrid, Relay
from benchmarks._server_faults import SERVER_KINDS, ServerFaults
from fedsplit.assets import default_checkpoint
from fedsplit.data import DataSpec, load_data
from fedsplit.execution import OptimizerSpec
from fedsplit.flower import Job, LinkSettings, StageHost
from fedsplit.flower.messages import EVALUATE, TRAIN
from fedsplit.flower.server.coordinator import Coordinator
from fedsplit.flower.server.outcome import BranchOutcome, TurnOutcome
from fedsplit.flower.server.roster import DeviceNode, EdgeNode, Roster
from fedsplit.models import ModelSpec, read_tokenizer
from fedsplit.patience import Patience
from fedsplit.plan import Branch, Failure, Route, Turn

STEPS = 3
KINDS, PHASES = ("kill", "freeze", "cut", "reset", "malformed"), ("start", "step", "end")
JOINERS = ("claim", "nonsense", "silence")
START_S, CONNECT_S, DEADLINE_S, HANG_S = 30.0, 30.0, 60.0, 90.0
FLOOR_SURVIVED, CEILING_DETECT_S = 1.0, 5.0
ONE_IN = 10


class Federation:
    """The server's side, and one round after the other on it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        for index in range(DEVICES):
            words = "\n\n".join(f"Device {index} counts {n} and {n * n}." for n in range(40))
            (folder / f"{index}.txt").write_text(words)
        self._job = Job(
            model=ModelSpec(source=str(default_checkpoint()), r=2),
            data=DataSpec(source="text", path=str(folder), seq_len=16, min_samples=4),
            optimizer=OptimizerSpec(name="adamw", lr=3e-3),
            n_devices=DEVICES,
            batch_size=2,
            seed=0,
            accelerator="cpu",
            patience=Patience(connect_s=CONNECT_S, deadline_s=DEADLINE_S, start_s=START_S),
        )
        cloud, *edges = free_ports(1 + EDGES)
        self._relays = [Relay(port) for port in (cloud, *edges)]
        self._binds = [f"127.0.0.1:{port}" for port in edges]
        addresses = [f"127.0.0.1:{relay.port}" for relay in self._relays]
        link = LinkSettings(bind=f"127.0.0.1:{cloud}", advertise=addresses[0])
        self._host = stack.enter_context(StageHost(self._job, link))
        self._adapters = self._host.initial_adapters()
        data = load_data(
            self._job.data, read_tokenizer(self._job.model.source), DEVICES, self._job.seed
        )
        self._roster = Roster(
            tuple(
                DeviceNode(index + 1, index, len(data.train(index)), len(data.test(index)))
                for index in range(DEVICES)
            ),
            tuple(EdgeNode(DEVICES + i + 1, i, addresses[1 + i]) for i in range(EDGES)),
        )
        route = Route.three_tier(self._host.n_blocks, 1, 2)
        self._turns = [
            replace(Turn(device, route, STEPS), edge=device % EDGES) for device in range(DEVICES)
        ]

    def round(self, work: str, fault: Fault | None = None) -> "Outcome":
        """Run the branches of one round of training or evaluation, with one fault or none."""
        grid = ProcessGrid(self._binds, self._relays, fault)
        coordinator = Coordinator(grid, self._host, job=self._job, roster=self._roster)
        adapters = self._adapters
        started = time.monotonic()
        try:
            if work == TRAIN:
                branches = [Branch((turn,)) for turn in self._turns]
                outcomes, failures = coordinator.train(1, branches, adapters)
                self._nobody_moved(coordinator)
                return _trained(outcomes, failures, grid.struck_unix_s, time.monotonic() - started)
            turns, failures = coordinator.evaluate(1, self._turns, adapters)
            self._nobody_moved(coordinator)
            return _evaluated(turns, failures, grid.struck_unix_s, time.monotonic() - started)
        finally:
            grid.close()
            for relay in self._relays:
                relay.mend()

    def _nobody_moved(self, coordinator: Coordinator) -> None:
        coordinator.welcome_back()
        nodes = coordinator.roster.nodes, coordinator.roster.edges
        if nodes != (self._roster.nodes, self._roster.edges):
            raise RuntimeError(f"somebody took another's place: {nodes}")


@dataclass(frozen=True)
class Outcome:
    """A round: what each surviving device's branch came to, who failed, when the fault struck."""

    results: dict[int, Any]
    failures: tuple[Failure, ...]
    struck_unix_s: float | None
    wall_s: float


def _trained(
    outcomes: Sequence[BranchOutcome],
    failures: tuple[Failure, ...],
    struck: float | None,
    wall_s: float,
) -> Outcome:
    results = {
        outcome.branch.turns[0].device: outcome.adapters for outcome in outcomes if outcome.survived
    }
    return Outcome(results, failures, struck, wall_s)


def _evaluated(
    turns: Sequence[TurnOutcome],
    failures: tuple[Failure, ...],
    struck: float | None,
    wall_s: float,
) -> Outcome:
    results = {turn.turn.device: torch.tensor(turn.loss_sum) for turn in turns}
    return Outcome(results, failures, struck, wall_s)


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def draw(count: int, seed: int) -> list[Fault]:
    """Return `count` faults: every role, kind and phase in turn, nodes and work drawn."""
    rng = random.Random(seed)
    places = [(r, k, p) for r in ("device", "edge") for k in KINDS for p in PHASES]
    places += [("joiner", "joiner", phase) for phase in JOINERS]
    rng.shuffle(places)
    faults = []
    for index in range(count):
        role, kind, phase = places[index % len(places)]
        device, edge = rng.randrange(DEVICES), DEVICES + rng.randrange(EDGES)
        node = {"device": device, "edge": edge, "joiner": JOINER}[role]
        work = rng.choice((TRAIN, EVALUATE))
        faults.append(Fault(node, work, phase, kind))
    return faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code says whether every round survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    folder = Path(tempfile.mkdtemp(prefix="fedsplit-faults-"))
    survived = lost = hangs = orphans = 0
    detect: dict[str, list[float]] = defaultdict(list)
    server_detect: list[float] = []
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        federation = Federation(folder, stack)
        expected = {work: federation.round(work) for work in (TRAIN, EVALUATE)}
        for work, outcome in expected.items():
            if len(outcome.results) < DEVICES:
                print(f"{work}: the undisturbed round failed: {outcome.failures}", file=sys.stderr)
                return 1
        n_server = options.faults // ONE_IN
        faults = draw(options.faults - n_server, options.seed)
        for fault in faults:
            outcome = federation.round(fault.work, fault)
            spared = set(range(DEVICES)) - fault.hits
            broken = [
                device
                for device in spared
                if device not in outcome.results
                or not _equal(outcome.results[device], expected[fault.work].results[device])
            ]
            hung, struck = outcome.wall_s > HANG_S, outcome.struck_unix_s is not None
            lost, hangs = lost + len(broken), hangs + hung
            survived += struck and not broken and not hung
            when = [
                failure.unix_s - outcome.struck_unix_s
                for failure in outcome.failures
                if failure.unix_s is not None and outcome.struck_unix_s is not None
            ]
            detect[fault.phase] += when
            shown = f"{max(when):5.1f} s" if when else "   none"
            print(
                f"{fault.role:6} {fault.node % DEVICES} {fault.work:15} {fault.phase:8} "
                f"{fault.kind:9}  noticed {shown}  dropped {len(outcome.failures)}  "
                f"round {outcome.wall_s:5.1f} s  "
                f"{f'LOST {broken}' if broken else 'ok' if struck else 'NOT STRUCK'}",
                flush=True,
            )
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedsplit-faults-"))
        server_faults = ServerFaults(Path(place))
        if n_server and not server_faults.undisturbed():
            print("fedsplit run: the undisturbed run failed", file=sys.stderr)
            return 1
        for index in range(n_server):
            kind = SERVER_KINDS[index % len(SERVER_KINDS)]
            end = server_faults.strike(f"{index}-{kind}", kind)
            lost, hangs, orphans = lost + (not end.equal), hangs + end.hung, orphans + end.orphans
            survived += end.equal and not end.hung and not end.orphans
            if end.detect_s is not None:
                server_detect.append(end.detect_s)
            shown = "   none" if end.detect_s is None else f"{end.detect_s:5.1f} s"
            print(
                f"server   {'fedsplit run':15} round {kind:9}  noticed {shown}  "
                f"resumed from round {end.resumed_from}  run {end.wall_s:5.1f} s  "
                f"{'ok' if end.equal else 'LOST'}{', HUNG' if end.hung else ''}"
                f"{f', {end.orphans} ORPHANS' if end.orphans else ''}",
                flush=True,
            )
    everything = [value for values in detect.values() for value in values]
    report = {
        "injected": options.faults,
        "injected_server": n_server,
        "survived": survived,
        "detect_s_max": round(max(everything, default=0.0), 2),
        "lost": lost,
        "hangs": hangs,
        "orphans": orphans,
        "detect_s_max_by_phase": {
            phase: round(max(values), 2) for phase, values in sorted(detect.items()) if values
        },
        "server_exit_s_max": round(max(server_detect, default=0.0), 2),
        "start_s": START_S,
    }
    print(json.dumps(report))
    whole = survived >= FLOOR_SURVIVED * options.faults and not (lost or hangs or orphans)
    return 0 if whole and report["detect_s_max"] <= CEILING_DETECT_S else 1


if __name__ == "__main__":
    sys.exit(main())
