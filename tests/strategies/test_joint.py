"""The joint plan beats what is decided in common, keeps its limits, and trains as SplitFed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fedsplit.apps.config import load_config
from fedsplit.apps.plan import Scenario, build_scenario
from fedsplit.strategies.joint import Joint
from fedsplit.strategies.splitfed import SplitFed
from flwr.serverapp.strategy import Strategy

from fedsplit.errors import FedsplitError
from fedsplit.plan import RoundPlan, Route, Turn
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
    top = float(scenario.system.fleet.servers.clock_hz[0])
    assert sum(turn.uplink_hz or 0 for turn in turns) == pytest.approx(1e9, rel=1e-6)
    assert sum(turn.downlink_hz or 0 for turn in turns) == pytest.approx(1e9, rel=1e-6)
    assert sum(turn.server_hz or 0 for turn in turns) == pytest.approx(top, rel=1e-6)


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
        ({"codec_table": "nowhere.csv"}, "nowhere.csv"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(FedsplitError, match=named):
        Joint(**settings)  # type: ignore[arg-type]
