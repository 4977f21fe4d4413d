"""Turns that meet at a real server are served in the order that the timeline says."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from fedsplit.execution import Stage, compute, train_turn
from fedsplit.fleet import FleetSpec, ServingSpec, build_fleet, timeline
from fedsplit.models import Boundary, load
from fedsplit.plan import DEVICE, RoundPlan, Route, Turn
from fedsplit.transport import BackwardReply, Gradients, InProcessLink, ServerLimits
from tests.fleet.fleet_scenarios import TYPES, random_profile, random_state
from tests.tiny_split import BLOCKS, OPTIMIZER, Cluster, batches, gpt2, initial

SPEC = gpt2()
HOME = Route.u_shaped(BLOCKS, 1, 3)
DEVICES, STEPS = 4, 3

Event = tuple[str, int, int]


def _said(seed: int, places: int) -> tuple[list[Event], list[list[float]]]:
    """Return what the timeline says of a server that needs hardly any time, but has so much room.

    Its services in order, and the seconds that each device and its radio need before each.
    """
    serving = ServingSpec("fifo", waiting_steps=places)
    fleet = build_fleet(FleetSpec(devices=DEVICES, types=TYPES, serving=serving), seed)
    ready = replace(fleet.servers, flops_per_cycle=1e5 * fleet.servers.flops_per_cycle)
    fleet = replace(fleet, servers=ready)
    plan = RoundPlan.parallel([Turn(device, HOME, STEPS) for device in range(DEVICES)])
    line = timeline(plan, random_profile(seed, BLOCKS), fleet, random_state(seed, fleet), 8)
    served: list[tuple[float, Event]] = []
    passes: list[list[float]] = [[] for _ in range(DEVICES)]
    before = [0.0] * DEVICES
    for activity in line.activities(detail=True):
        device = activity.branch
        if device >= 0 and activity.entity != "server":
            before[device] += activity.end_s - activity.start_s
        elif device >= 0:
            served.append((activity.start_s, (activity.label, device, activity.step)))
            passes[device].append(before[device])
            before[device] = 0.0
    return [event for _, event in sorted(served)], passes


class Clock:
    """Time that goes on when all devices sleep, or wait for room at `stage`; work takes none."""

    def __init__(self, stage: Stage) -> None:
        self._room = stage._places
        self._now_s = 0.0
        self._wakes: dict[int, float] = {}
        self._live = DEVICES
        self._changed = threading.Condition()

    def sleep(self, device: int, seconds: float) -> None:
        """Let time go by for a device."""
        with self._changed:
            self._wakes[device] = self._now_s + seconds
            self._changed.wait_for(lambda: device not in self._wakes)

    def leave(self) -> None:
        """Have one device fewer."""
        with self._changed:
            self._live -= 1

    def run(self) -> None:
        """Wake one device after the other until all have left."""
        until_s = time.monotonic() + 120
        while self._live:
            with self._changed:
                waiting = 0 if self._room._free else len(self._room._queue)
                if self._wakes and len(self._wakes) + waiting == self._live:
                    device = min(self._wakes, key=lambda who: self._wakes[who])
                    self._now_s = self._wakes.pop(device)
                    self._changed.notify_all()
            assert time.monotonic() < until_s, (self._wakes, self._live)
            time.sleep(0.001)


class Paced(InProcessLink):
    """A link to a server from a device that is as slow as it is told, with a radio that is too."""

    def __init__(
        self, stage: Stage, device: int, passes: Sequence[float], seen: list[Event], clock: Clock
    ) -> None:
        super().__init__(stage)
        self._device, self._passes, self._seen = device, iter(passes), seen
        self._clock, self._step = clock, 0

    def forward(self, *sent: Any) -> Boundary:
        """See `Link.forward`."""
        self._clock.sleep(self._device, next(self._passes))
        reply = super().forward(*sent)
        self._seen.append(("forward", self._device, self._step))
        return reply

    def backward(self, gradients: Gradients) -> BackwardReply:
        """See `Link.backward`."""
        self._clock.sleep(self._device, next(self._passes))
        # Before it, as others may find room because of it; nothing holds it up.
        self._seen.append(("backward", self._device, self._step))
        self._step += 1
        return super().backward(gradients)


@pytest.mark.parametrize("places", [1, 2, 16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_devices_with_tails_are_served_in_the_order_of_the_timeline(seed: int, places: int) -> None:
    expected, passes = _said(seed, places)
    seen: list[Event] = []
    adapters = initial(SPEC)
    with Cluster(SPEC, limits=ServerLimits(waiting_steps=places)) as cluster:
        stage = cluster.stage("server")
        clock = Clock(stage)
        model = compute(lambda: load(SPEC, HOME.on(DEVICE)))

        def turn(device: int) -> None:
            try:
                train_turn(
                    model,
                    HOME,
                    batches(STEPS, device),
                    adapters=adapters,
                    optimizer=OPTIMIZER,
                    seed=device,
                    link=Paced(stage, device, passes[device], seen, clock),
                    token=cluster.open(HOME, adapters, seed=device)["server"],
                )
            finally:
                clock.leave()

        threads = [threading.Thread(target=turn, args=(device,)) for device in range(DEVICES)]
        for thread in threads:
            thread.start()
        clock.run()
        for thread in threads:
            thread.join()
    assert seen == expected


def test_room_for_one_step_and_for_many_are_two_orders() -> None:
    assert _said(0, 1)[0] != _said(0, 16)[0]
