"""The joint plan beats what is decided in common, keeps its limits, and trains as SplitFed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedsplit.apps.config import load_config
from fedsplit.apps.plan import Scenario, build_scenario
from fedsplit.strategies.joint import Joint
from fedsplit.strategies.sft import Sft
from fedsplit.strategies.splitfed import SplitFed
from flwr.serverapp.strategy import Strategy

from fedsplit.errors import FedsplitError
from fedsplit.fleet import ServingSpec
from fedsplit.fleet.fleet import DISCIPLINES
from fedsplit.plan import RoundPlan, Route, Turn
from fedsplit.planning import plan_weighted
from fedsplit.schemes import Scene, planned
from fedsplit.testing.scenes import make_scene
from tests.flower.conftest import Federation

# Weak devices on a wide band, who gain by a server.
SPLIT = ("channel.bandwidth_hz=1e9", "fleet.types=[jetson_nano]")
UNCONTENDED = "fleet.serving.discipline=unlimited"
TABLE = """ratio,loss_increase,name,settings
0.25,0.2,int8,{}
0.5,0.05,bf16,{}
1.0,0.0,identity,{}
"""


def scenario_of(*overrides: str) -> Scenario:
    return build_scenario(load_config(["strategy=joint", *overrides]))


def turns_of(scenario: Scenario, server_round: int = 1) -> list[Turn]:
    return [turn for branch in scenario.plan_round(server_round).branches for turn in branch.turns]


QUALITY = (
    TABLE
    + """0.25,0.1,rank,"{""r"": 2}"
1.0,0.1,frozen,"{""name"": ""frozen"", ""cut"": 1}"
1.0,0.15,frozen,"{""cut"": 3}"
"""
)


@pytest.fixture
def quality(tmp_path: Path) -> str:
    path = tmp_path / "quality.csv"
    path.write_text(QUALITY)
    return str(path)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "codecs.csv"
    path.write_text(TABLE)
    return path


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        SPLIT,
        ("fleet=heterogeneous", "fleet.devices=7", "channel.bandwidth_hz=3e8"),
        ("codec=int8",),
    ],
)
def test_no_common_cut_with_equal_shares_is_faster(overrides: tuple[str, ...]) -> None:
    scenario = scenario_of(*overrides, "strategy.codec_table=null", UNCONTENDED)
    for server_round in (1, 2):
        turns = turns_of(scenario, server_round)
        scene = scenario.system.scene(server_round, {turn.device: 100 for turn in turns})
        clock = float(scene.fleet.servers.clock_hz[0]) / len(turns)
        common = [
            RoundPlan.parallel(
                replace(scene.turn(device, Route.at_cut(scene.n_blocks, cut)), server_hz=clock)
                for device in scene.devices
            )
            for cut in range(1, scene.n_blocks + 1)
        ]
        fits = scene.fleet.devices.memory_bytes
        costs = [scenario.system.timeline(plan, server_round).cost for plan in common]
        best = min(cost.delay_s for cost in costs if (cost.device_memory_bytes <= fits).all())
        mine = scenario.timeline(server_round).cost
        assert mine.delay_s <= best * (1 + 1e-9)
        assert (mine.device_memory_bytes <= fits).all()


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [
        ((), 1.0),
        (("fleet=heterogeneous",), 1.0),
        (("channel.bandwidth_hz=4e8",), 1.0),
        # Where cuts are the same for all anyway: a queue does not divide the server as planned.
        (SPLIT, 1.01),
    ],
)
def test_cuts_of_their_own_shorten_the_rounds_of_sft(
    overrides: tuple[str, ...], factor: float
) -> None:
    """The same codecs within the same limit on the loss."""
    joint, sft = (
        build_scenario(load_config([f"strategy={name}", *overrides])) for name in ("joint", "sft")
    )
    for server_round in (1, 2, 3):
        delays = [each.timeline(server_round).cost.delay_s for each in (joint, sft)]
        assert delays[0] < factor * delays[1]


def test_bands_and_server_are_given_away_once() -> None:
    scenario = scenario_of(UNCONTENDED, *SPLIT)
    turns = turns_of(scenario)
    assert {len(turn.route.segments) for turn in turns} == {2}
    assert sum(turn.uplink_hz or 0 for turn in turns) == pytest.approx(1e9, rel=1e-6)
    assert sum(turn.downlink_hz or 0 for turn in turns) == pytest.approx(1e9, rel=1e-6)
    # Nobody waits for another: dividing the server would only slow it down.
    assert {turn.server_hz for turn in turns} == {None}


@pytest.mark.parametrize("discipline", DISCIPLINES)
def test_it_shares_the_server_as_sft_does(discipline: str) -> None:
    """Of devices all alike, cut alike, both expect the same of the server."""
    scene = replace_serving(make_scene(4), discipline)
    problems = [
        Joint(codec_table=None)._problem(scene),
        Sft(codec_table=None)._problem(
            scene, scene.devices, scene.channel, list(scene.samples.values())
        ),
    ]
    first, second = (np.asarray(problem.server_flops_per_s) for problem in problems)
    np.testing.assert_array_equal(first, second)


def replace_serving(scene: Scene, discipline: str) -> Scene:
    return replace(scene, fleet=replace(scene.fleet, serving=ServingSpec(discipline)))


@pytest.mark.parametrize("discipline", DISCIPLINES)
@pytest.mark.parametrize("goal", [{"goal": "energy"}, {"goal": "weighted", "delay_weight": 20.0}])
def test_rounds_cost_what_was_planned(goal: dict[str, object], discipline: str) -> None:
    """The timeline finds the plan's energy, and no more delay than it promises."""
    scene = replace_serving(make_scene(5), discipline)
    scheme = Joint(codec_table=None, **goal)  # type: ignore[arg-type]
    problem = scheme._problem(scene)
    promised = plan_weighted(scheme._weighted_problem(scene, problem, problem.costs))
    line = scene.timeline(planned(scheme, scene))
    assert line.cost.device_energy_j == pytest.approx(promised.device_j, rel=1e-6)
    assert line.cost.energy_j - line.aggregation_j == pytest.approx(promised.energy_j, rel=1e-6)
    assert line.cost.delay_s - line.aggregation_s <= promised.delay_s * (1 + 1e-9)
    if discipline in ("unlimited", "partition"):
        assert line.cost.delay_s - line.aggregation_s == pytest.approx(promised.delay_s, rel=1e-6)


def test_goals_reach_what_they_are_named_after() -> None:
    scene = make_scene(6)
    settings = ({}, {"goal": "weighted", "delay_weight": 0.5}, {"goal": "energy"})
    costs = [
        scene.timeline(planned(Joint(codec_table=None, **one), scene)).cost  # type: ignore[arg-type]
        for one in settings
    ]
    assert costs[0].delay_s < costs[1].delay_s < costs[2].delay_s
    assert costs[0].energy_j > costs[1].energy_j > costs[2].energy_j
    both = [cost.energy_j + 0.5 * cost.delay_s for cost in costs]
    assert min(both) == both[1]


@pytest.mark.parametrize("goal", ["delay", "weighted"])
def test_budgets_hold_in_the_long_run_and_not_at_any_price(goal: str) -> None:
    """A budget of less than a device would spend: kept on average, while others stay fast."""
    free, n_rounds = Joint(goal=goal, codec_table=None, delay_weight=50.0), 25
    first = make_scene(3)
    usual = first.timeline(planned(free, first)).cost
    budget = 0.7 * float(usual.device_energy_j.max())
    kept = Joint(goal=goal, codec_table=None, delay_weight=50.0, budget_j=budget)
    spent = np.zeros(3)
    for server_round in range(1, n_rounds + 1):
        scene = replace(make_scene(3, server_round=server_round), spent_j=spent)
        cost = scene.timeline(planned(kept, scene)).cost
        spent = spent + cost.device_energy_j
    assert (spent / n_rounds).max() <= 1.05 * budget
    # It is used, too: who stays far below it needlessly is slow.
    assert (spent / n_rounds).max() >= 0.9 * budget


def test_a_server_with_a_queue_keeps_its_clock() -> None:
    assert {turn.server_hz for turn in turns_of(scenario_of(*SPLIT))} == {None}


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.1, 0.2])
def test_codecs_come_from_the_table_within_the_limit(table: Path, limit: float) -> None:
    loss = {"int8": 0.2, "bf16": 0.05, "identity": 0.0}
    turns = turns_of(
        scenario_of(f"strategy.codec_table={table}", f"strategy.max_loss_increase={limit}", *SPLIT)
    )
    names = [str(turn.codec.uplink["name"]) for turn in turns]
    assert sum(loss[name] for name in names) / len(names) <= limit + 1e-12
    assert {turn.codec.downlink["name"] for turn in turns} == {"identity"}
    if limit == 0.2:
        assert set(names) == {"int8"}


def test_gradients_may_use_the_chosen_setting(table: Path) -> None:
    settings = (f"strategy.codec_table={table}", "strategy.compress_gradients=true")
    turns = turns_of(scenario_of(*settings, *SPLIT))
    assert all(turn.codec.uplink == turn.codec.downlink for turn in turns)
    assert {turn.codec.uplink["name"] for turn in turns} != {"identity"}


def small_scene(memory_bytes: float, devices: int = 3) -> Scene:
    """Return devices of so much memory before a server that nobody queues for."""
    scene = replace_serving(make_scene(devices), "unlimited")
    machines = replace(scene.fleet.devices, memory_bytes=np.full(devices, memory_bytes))
    profile = replace(scene.profile, rank=8)
    return replace(scene, profile=profile, fleet=replace(scene.fleet, devices=machines))


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("memory_bytes", [60e6, 200e6])
def test_ranks_and_frozen_devices_come_from_the_table(
    quality: str, memory_bytes: float, limit: float
) -> None:
    """Within memory and the limit on the loss, and never slower than without the choice."""
    scene = small_scene(memory_bytes)
    plan = planned(Joint(codec_table=quality, max_loss_increase=limit), scene)
    cost = scene.timeline(plan).cost
    assert (cost.device_memory_bytes <= memory_bytes).all()
    harm = {"int8": 0.2, "bf16": 0.05, "identity": 0.0}
    turns = [turn for branch in plan.branches for turn in branch.turns]
    losses = [
        harm[str(turn.codec.uplink["name"])]
        + (0.1 if turn.rank == 2 else 0.0)
        + ({1: 0.1, 3: 0.15}[turn.route.segments[0].stop] if turn.frozen else 0.0)
        for turn in turns
    ]
    samples = [scene.samples[turn.device] for turn in turns]
    assert np.average(losses, weights=samples) <= limit + 1e-9
    without = replace_table(Joint(codec_table=quality, max_loss_increase=limit))
    usual = scene.timeline(planned(without, scene)).cost
    assert cost.delay_s <= usual.delay_s * (1 + 1e-9)
    changed = any(turn.frozen or turn.rank for turn in turns)
    assert not changed if limit == 0 else changed or memory_bytes > 100e6


def replace_table(scheme: Joint) -> Joint:
    """Return the scheme without ranks and frozen devices to choose from."""
    assert scheme.table is not None
    scheme.table = replace(scheme.table, ranks={}, frozen={})
    return scheme


def test_devices_that_hold_no_part_otherwise_are_frozen(quality: str) -> None:
    """The least part to train takes more than they have, to infer with it does not."""
    scene = small_scene(1e9)
    line = scene.timeline(
        RoundPlan.parallel(scene.turn(n, Route.two_tier(scene.n_blocks, 1)) for n in range(3))
    )
    tight = small_scene(0.9 * float(line.cost.device_memory_bytes.min()))
    with pytest.raises(FedsplitError, match="memory of device 0"):
        planned(Joint(codec_table=None), tight)
    plan = planned(Joint(codec_table=quality, max_loss_increase=0.3), tight)
    assert all(turn.frozen for branch in plan.branches for turn in branch.turns)


def test_ranks_are_chosen_or_given(quality: str) -> None:
    scene = small_scene(1e9)
    given = replace(scene, work=replace(scene.work, ranks={0: 2}))
    with pytest.raises(FedsplitError, match=r"model.r_by_device=.*must be null"):
        planned(Joint(codec_table=quality), given)


@pytest.mark.parametrize("goal", [{"goal": "energy"}, {"budget_j": 1.0}])
def test_other_goals_refuse_a_table_of_ranks(quality: str, goal: dict[str, Any]) -> None:
    with pytest.raises(FedsplitError, match="strategy.goal=.*must be delay, without a budget"):
        Joint(codec_table=quality, **goal)


def test_it_trains_as_splitfed(federation: Federation, fedavg: Strategy) -> None:
    expected, _ = federation.run(SplitFed(cut=2), fedavg)
    found, outcomes = federation.run(Joint(codec_table=None), fedavg)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert not outcomes[1].failures


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_loss_increase": float("nan")}, "strategy.max_loss_increase=nan"),
        ({"min_cut": -1}, "strategy.min_cut=-1"),
        ({"goal": "fame"}, "strategy.goal='fame'"),
        ({"delay_weight": -1.0}, "strategy.delay_weight=-1.0"),
        ({"budget_j": 0.0}, "strategy.budget_j=0.0"),
        ({"codec_table": "nowhere.csv"}, "nowhere.csv"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(FedsplitError, match=named):
        Joint(**settings)  # type: ignore[arg-type]
