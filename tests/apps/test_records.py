"""What links counted, hop by hop: the timeline of a run has every byte once."""

import numpy as np
import pytest
from fedsplit.apps.records import sent_bytes

from fedsplit.fleet import timeline
from fedsplit.flower.server.outcome import BranchOutcome, RoundOutcome, TurnOutcome
from fedsplit.plan import Branch, RoundPlan, Route, Turn
from tests.fleet.fleet_scenarios import N_BLOCKS, random_fleet, random_profile, random_state

STEPS = 4
RADIO = {"up": 70_000, "down": 50_000}
WIRE = {"backhaul-up": 64_000, "backhaul-down": 48_000}


@pytest.mark.parametrize(
    ("route", "counted", "edges", "on_the_wire"),
    [
        (Route.two_tier(N_BLOCKS, 2), RADIO, 0, 0),
        (Route.two_tier(N_BLOCKS, 2), RADIO, 1, 120_000),  # no edge tier, but a wire to the cloud
        (Route.u_shaped(N_BLOCKS, 1, 3), RADIO, 0, 0),
        (Route.three_tier(N_BLOCKS, 1, 3), RADIO | WIRE, 1, 112_000),
        (Route.through(N_BLOCKS, (1, 3), ("device", "edge", "device")), RADIO, 1, 0),
        (
            Route.through(N_BLOCKS, (1, 2, 4), ("device", "edge", "cloud", "device")),
            RADIO | WIRE,
            1,
            112_000,
        ),
        (Route.device_only(N_BLOCKS), {"up": 0, "down": 0}, 1, 0),
    ],
    ids=str,
)
def test_every_byte_of_a_run_is_costed_once(route, counted, edges, on_the_wire):
    turn = Turn(0, route, STEPS)
    branch = Branch((turn,))
    done = TurnOutcome(turn, 1.0, 1, None, 8, STEPS, counted, 1.0)
    plan = RoundPlan((branch,))
    outcome = RoundOutcome(1, plan, (BranchOutcome(0, branch, {}, (done,)),), 1.0)
    fleet, profile = random_fleet(0, 1, edges), random_profile(0)
    state = random_state(0, fleet)
    found, silent = (
        timeline(plan, profile, fleet, state, 8, sent=sent).cost
        for sent in (sent_bytes(outcome), no_bytes(route))
    )
    for name, expected in (
        ("uplink_bytes", counted["up"]),
        ("downlink_bytes", counted["down"]),
        ("backhaul_bytes", on_the_wire),
    ):
        links = np.sum(getattr(found, name)) - np.sum(getattr(silent, name))
        assert links == pytest.approx(expected), name


def no_bytes(route):
    """What leaves adapters alone on radio and wire."""
    return {(0, 0, hop): (0.0, 0.0) for hop in range(len(route.segments) - 1)}
