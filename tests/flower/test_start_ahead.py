"""The next device of a branch gets ready while the present one trains; nothing else changes."""

import time

import pytest
from fedsplit.strategies.vanilla import Vanilla
from flwr.app import Message
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsplit.flower import RoundOutcome
from fedsplit.plan import RoundPlan, Route
from fedsplit.schemes import Scene, Scheme
from tests.flower.conftest import N_DEVICES, Federation
from tests.flower.test_strategy import assert_equal

TIMES_S = 1.0


class Slow:
    """Devices that take a while to start; remembers when each was sent its task."""

    def __init__(self) -> None:
        self.sent_s: dict[int, float] = {}

    def __call__(self, message: Message, device: int) -> None:
        if message.metadata.message_type.startswith("train"):
            self.sent_s[device] = time.monotonic()
            time.sleep(TIMES_S)


def sums(outcomes: list[RoundOutcome]) -> list[float]:
    """Return what every turn measured."""
    return [turn.loss_sum for outcome in outcomes for turn in (*outcome.turns, *outcome.evaluation)]


class Home(Scheme):
    """All devices one after the other, their labels at home; or in groups of two."""

    def __init__(self, width: int) -> None:
        self.width = width

    def plan_round(self, scene: Scene) -> RoundPlan:
        route = Route.u_shaped(scene.n_blocks, 1, 3)
        turns = [scene.turn(device, route) for device in scene.devices]
        return RoundPlan.grouped(
            turns[start : start + self.width] for start in range(0, len(turns), self.width)
        )


@pytest.fixture
def plain(federation: Federation, fedavg: Strategy) -> tuple[dict[str, Tensor], list[RoundOutcome]]:
    """Return two rounds in which every device is started in its turn."""
    return federation.run(Vanilla(cut=2), fedavg, rounds=2)


def test_results_are_the_same_to_the_last_bit(
    federation: Federation,
    fedavg: Strategy,
    plain: tuple[dict[str, Tensor], list[RoundOutcome]],
) -> None:
    found, outcomes = federation.run(Vanilla(cut=2), fedavg, rounds=2, start_ahead=True)
    assert_equal(found, plain[0], tolerance=0)
    assert sums(outcomes) == sums(plain[1])
    for one, other in zip(outcomes[1].turns, plain[1][1].turns, strict=True):
        carried = {name: other.link_bytes[name] for name in ("up", "down")}
        assert {name: one.link_bytes[name] for name in carried} == carried


@pytest.mark.parametrize("width", [2, 4])
def test_a_device_that_keeps_its_labels_may_be_started_ahead_too(
    federation: Federation, fedavg: Strategy, width: int
) -> None:
    expected, _ = federation.run(Home(width), fedavg)
    found, _ = federation.run(Home(width), fedavg, start_ahead=True)
    assert_equal(found, expected, tolerance=0)


def test_the_next_device_starts_while_the_present_one_trains(
    federation: Federation, fedavg: Strategy
) -> None:
    def seconds(start_ahead: bool) -> tuple[float, dict[int, float]]:
        slow = Slow()
        _, outcomes = federation.run(Vanilla(cut=2), fedavg, disturb=slow, start_ahead=start_ahead)
        assert not outcomes[1].failures
        return outcomes[1].wall_s, slow.sent_s

    one_by_one_s, _ = seconds(False)
    ahead_s, sent_s = seconds(True)
    assert one_by_one_s > N_DEVICES * TIMES_S
    assert ahead_s < one_by_one_s - (N_DEVICES // 2 - 1) * TIMES_S
    assert sent_s[1] < sent_s[0] + TIMES_S, "before the first one can have ended"


def test_a_device_that_fails_while_it_waits_is_noticed_before_its_turn(
    federation: Federation, fedavg: Strategy
) -> None:
    struck: list[float] = []

    def disturb(message: Message, device: int) -> None:
        if message.metadata.message_type.startswith("train"):
            if device == 1:
                struck.append(time.time())
                raise RuntimeError("battery empty")
            time.sleep(4 if device == 0 else 0)

    noticed: list[tuple[str, float]] = []
    found, outcomes = federation.run(
        Vanilla(cut=2),
        fedavg,
        disturb=disturb,
        start_ahead=True,
        on_failure=lambda failure: noticed.append((failure.who, time.time())),
    )
    expected, _ = federation.run(Vanilla(cut=2), fedavg, disturb=disturb)
    assert_equal(found, expected, tolerance=0)
    ((who, when),) = noticed
    assert who == "device 1"
    assert when < struck[0] + 3, "while the first one still trains"
    assert [turn.turn.device for turn in outcomes[1].turns] == [0, 2, 3]


def test_one_place_is_enough(federation: Federation, fedavg: Strategy) -> None:
    found, outcomes = federation.run(
        Vanilla(cut=2), fedavg, concurrency=1, places=1, start_ahead=True
    )
    expected, _ = federation.run(Vanilla(cut=2), fedavg)
    assert_equal(found, expected, tolerance=0)
    assert not outcomes[1].failures
