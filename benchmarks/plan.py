"""How many rounds a second can be planned: ``python -m benchmarks.plan``.

A planned round is a new channel realisation, a plan and its timeline, here for GPT-2 small's shape
(batch 4 x 128, LoRA r=8), 10 steps per device and a cut of its own for each. SplitFed makes every
device queue at one server, the dearest case for the timeline; vanilla split learning has
no queue. Sizes are interleaved, the best of several turns counts, and time is this process's own.
Then every scheme that ships plans 10,000 devices, and its round becomes a timeline and a trace.

Floors: a round of 10,000 devices may take at most 20 times one of 1,000 (linear growth would be
10), and plan, timeline and trace of any scheme at most 2 s.
"""

import gc
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedsplit.fleet import FleetSpec, build_fleet, timeline, write_chrome_trace
from fedsplit.models import ModelSpec
from fedsplit.models.profile import profile_model
from fedsplit.plan import RoundPlan, Route, Turn
from fedsplit.profiles import ModelProfile
from fedsplit.schemes import LocalWork, Scene, find_scheme, scheme_names
from fedsplit.wireless import Channel, ChannelSpec

SIZES = (10, 1_000, 10_000)
TURNS = 5
BATCH, STEPS = 4, 10
MAX_GROWTH = 20.0
MAX_ROUND_S = 2.0
SCHEMES = {"splitfed": RoundPlan.parallel, "vanilla": RoundPlan.sequential}


class Case:
    """A scheme on a fleet of one size."""

    def __init__(self, scheme: str, n_devices: int, profile: ModelProfile) -> None:
        self._form, self._profile = SCHEMES[scheme], profile
        self._fleet = build_fleet(FleetSpec(devices=n_devices, clock=(0.5, 1.0)))
        places = self._fleet.devices.positions_m
        self._channel = Channel(
            ChannelSpec(), places, self._fleet.stations_m, home=self._fleet.home
        )
        self._round = 0

    def seconds(self, repeats: int) -> float:
        """Return the processor time of a round, over `repeats` rounds."""
        begin = time.process_time()
        for _ in range(repeats):
            self._round += 1
            self._plan_round()
        return (time.process_time() - begin) / repeats

    def _plan_round(self) -> None:
        n_blocks = self._profile.n_blocks
        plan = self._form(
            Turn(n, Route.two_tier(n_blocks, 1 + n % (n_blocks - 1)), STEPS)
            for n in range(self._fleet.n_devices)
        )
        state = self._channel.realise(self._round)
        timeline(plan, self._profile, self._fleet, state, BATCH)


def whole_round(name: str, profile: ModelProfile) -> tuple[float, float, float]:
    """Return the processor time of a scheme's plan, timeline and trace for 10,000 devices."""
    fleet = build_fleet(
        FleetSpec(devices=SIZES[-1], clock=(0.5, 1.0), edges=5 if name == "splitllm" else 0)
    )
    places = fleet.devices.positions_m
    channel = Channel(ChannelSpec(), places, fleet.stations_m, home=fleet.home)
    scene = Scene(
        server_round=1,
        samples=dict(enumerate(fleet.samples.tolist())),
        work=LocalWork(batch_size=BATCH, steps=STEPS),
        profile=profile,
        fleet=fleet,
        channel=channel.realise(1),
        mean_channel=channel.mean,
    )
    scheme = find_scheme(name)()
    marks = [time.process_time()]
    plan = scheme.plan_round(scene)
    marks.append(time.process_time())
    line = timeline(plan, profile, fleet, scene.channel, BATCH)
    marks.append(time.process_time())
    with tempfile.TemporaryDirectory() as folder:
        write_chrome_trace(line, Path(folder) / "trace.json")
    marks.append(time.process_time())
    return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]


def main() -> int:
    """Time every scheme and size; return the exit code."""
    profile = profile_model(ModelSpec(model_type="gpt2", r=8), 128)
    cases = {(scheme, n): Case(scheme, n, profile) for scheme in SCHEMES for n in SIZES}
    best = dict.fromkeys(cases, float("inf"))
    # The collector would scan torch's and transformers' own objects with every round's garbage.
    gc.collect()
    gc.freeze()
    for _ in range(TURNS):
        for key, case in cases.items():
            best[key] = min(best[key], case.seconds(max(1, 1_000 // key[1])))
    table = Table(title="Planning a round (processor time)")
    for heading in ("scheme", "devices", "ms per round", "us per device", "rounds per second"):
        table.add_column(heading, justify="right")
    for (scheme, n), seconds in best.items():
        figures = (1e3 * seconds, 1e6 * seconds / n, 1 / seconds)
        table.add_row(scheme, f"{n:,}", *(f"{figure:,.2f}" for figure in figures))
    Console().print(table)
    growth = {s: best[s, SIZES[-1]] / best[s, SIZES[-2]] for s in SCHEMES}
    rates = {s: {str(n): 1 / best[s, n] for n in SIZES} for s in SCHEMES}
    whole = {name: whole_round(name, profile) for name in scheme_names()}
    rounds = Table(title=f"A round of {SIZES[-1]:,} devices, s of processor time")
    for heading in ("scheme", "plan", "timeline", "trace", "together"):
        rounds.add_column(heading, justify="right")
    for name, parts in whole.items():
        rounds.add_row(name, *(f"{part:.2f}" for part in (*parts, sum(parts))))
    Console().print(rounds)
    slowest = max(sum(parts) for parts in whole.values())
    record = {
        "rounds_per_second": rates["splitfed"],
        "rounds_per_second_vanilla": rates["vanilla"],
        "growth_1000_to_10000": growth,
        "whole_round_s": {name: sum(parts) for name, parts in whole.items()},
    }
    print(json.dumps(record))
    return 0 if max(growth.values()) <= MAX_GROWTH and slowest <= MAX_ROUND_S else 1


if __name__ == "__main__":
    sys.exit(main())
