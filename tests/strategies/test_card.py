"""CARD takes the best cut and clock of all, and trains what vanilla split learning trains."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fedsplit.apps.config import load_config
from fedsplit.apps.plan import Scenario, build_scenario
from fedsplit.strategies.card import Card
from fedsplit.strategies.vanilla import Vanilla
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedsplit.errors import FedsplitError
from fedsplit.plan import RoundPlan, Route, Turn
from fedsplit.schemes import Scene
from tests.flower.conftest import Federation

N_CLOCKS = 60


def delay_and_energy(scenario: Scenario, turn: Turn) -> tuple[float, float]:
    cost = scenario.system.timeline(RoundPlan.sequential([turn]), 1).cost
    return cost.delay_s, float(cost.server_compute_j[0])


def grid(
    scenario: Scenario, scene: Scene, device: int, min_cut: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return delay and server energy of every cut and clock on the timeline, ``[cuts, clocks]``."""
    clocks = np.geomspace(*_clock_range(scene), N_CLOCKS)
    turns = [
        replace(scene.turn(device, Route.at_cut(scene.n_blocks, cut)), server_hz=float(clock))
        for cut in range(min_cut, scene.n_blocks + 1)
        for clock in clocks
    ]
    pairs = np.array([delay_and_energy(scenario, turn) for turn in turns])
    delay, energy = pairs.T.reshape(2, -1, N_CLOCKS)
    return delay, energy


def _clock_range(scene: Scene) -> tuple[float, float]:
    servers = scene.fleet.servers
    return float(servers.min_hz[0]), float(servers.clock_hz[0])


def scaled(values: NDArray[np.float64], chosen: float) -> tuple[NDArray[np.float64], float]:
    """Return the grid and what was chosen, from 0 at its least to 1 at its most.

    A server that does nothing spends nothing, which is beyond the scale.
    """
    low = values[values > 0].min()
    span = values.max() - low
    return (values - low) / span, float((chosen - low) / span)


@pytest.mark.parametrize(
    ("weight", "overrides"),
    [
        (0.5, ()),
        (0.9, ("strategy.min_cut=0", "channel.bandwidth_hz=2e8")),
        (0.2, ("codec=int8", "strategy.min_cut=2")),
        (0.8, ("channel.bandwidth_hz=1e9", "fleet.server=rtx_4060_ti")),
    ],
)
def test_every_device_gets_the_best_of_all_cuts_and_clocks(
    weight: float, overrides: tuple[str, ...]
) -> None:
    config = ["strategy=card", f"strategy.delay_weight={weight}", "fleet.devices=3", *overrides]
    scenario = build_scenario(load_config(config))
    scheme = scenario.scheme
    assert isinstance(scheme, Card)
    (branch,) = scenario.plan_round(1).branches
    scene = scenario.system.scene(1, {turn.device: 1 for turn in branch.turns})
    for turn in branch.turns:
        grids = grid(scenario, scene, turn.device, scheme.min_cut)
        delays, energies = (
            scaled(values, chosen)
            for values, chosen in zip(grids, delay_and_energy(scenario, turn), strict=True)
        )
        goals = weight * delays[0] + (1 - weight) * energies[0]
        mine = weight * delays[1] + (1 - weight) * energies[1]
        assert goals.min() - 1e-2 < mine <= goals.min() + 1e-9
        best_cut = scheme.min_cut + int(goals.min(axis=1).argmin())
        assert turn.route == Route.at_cut(scene.n_blocks, best_cut)


def test_a_larger_weight_trades_energy_for_delay() -> None:
    costs = []
    for weight in (0.0, 0.3, 0.6, 0.9, 1.0):
        config = ["strategy=card", f"strategy.delay_weight={weight}", "strategy.jointly=true"]
        config += ["channel.bandwidth_hz=1e9", "fleet.types=[jetson_nano]"]
        scenario = build_scenario(load_config(config))
        costs.append(scenario.timeline(1).cost)
        clocks = {turn.server_hz for turn in scenario.plan_round(1).branches[0].turns}
        assert len(clocks) == 1
    delays = [cost.delay_s for cost in costs]
    energies = [float(cost.server_compute_j[0]) for cost in costs]
    assert delays == sorted(delays, reverse=True)
    assert energies == sorted(energies)
    assert energies[0] < energies[-1]


def test_it_trains_as_vanilla_split_learning(federation: Federation, fedavg: Strategy) -> None:
    expected, _ = federation.run(Vanilla(cut=2), fedavg)
    found, outcomes = federation.run(Card(), fedavg)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert all(turn.turn.server_hz is not None for turn in outcomes[1].turns)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"delay_weight": 1.5}, "strategy.delay_weight=1.5"),
        ({"delay_weight": float("nan")}, "strategy.delay_weight=nan"),
        ({"min_cut": -1}, "strategy.min_cut=-1"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, float], named: str) -> None:
    with pytest.raises(FedsplitError, match=named):
        Card(**settings)
