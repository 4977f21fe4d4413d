"""Edge servers that are Flower nodes compute what edges inside the server do."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.serverapp.strategy import Strategy

from fedsplit.errors import FedsplitError
from fedsplit.flower.node import device as session
from fedsplit.patience import Patience
from fedsplit.plan import DEVICE, EDGE, RoundPlan, Route
from fedsplit.schemes import Scene, Scheme
from tests.flower.conftest import N_DEVICES, Federation
from tests.flower.test_strategy import assert_equal


class Edges(Scheme):
    """Two edges; `groups` says which devices train one after the other."""

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self.groups = groups

    def plan_round(self, scene: Scene) -> RoundPlan:
        route = Route.three_tier(scene.n_blocks, 1, 2)
        return RoundPlan.grouped(
            [replace(scene.turn(device, route), edge=device % 2) for device in group]
            for group in self.groups
        )


@pytest.mark.parametrize("groups", [[[0], [1], [2], [3]], [[0, 2], [3, 1]], [[0, 1, 2, 3]]])
def test_edges_as_nodes_equal_edges_in_the_server(
    federation: Federation, fedavg: Strategy, tmp_path: Path, groups: list[list[int]]
) -> None:
    hosted, expected = federation.run(Edges(groups), fedavg)
    remote, outcomes = federation.run(Edges(groups), fedavg, edge_folder=tmp_path)
    assert_equal(remote, hosted, tolerance=0)
    assert not outcomes[1].failures
    for found, wanted in zip(outcomes[1].turns, expected[1].turns, strict=True):
        assert found.link_bytes == wanted.link_bytes
        assert found.loss_sum == wanted.loss_sum


class AtTheEdge(Scheme):
    """The route ends at the edge: there is nothing for the cloud to compute."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        route = Route.through(scene.n_blocks, (1,), (DEVICE, EDGE))
        turns = [scene.turn(device, route) for device in scene.devices]
        return RoundPlan.parallel(replace(turn, edge=turn.device % 2) for turn in turns)


def test_a_route_may_end_at_an_edge(
    federation: Federation, fedavg: Strategy, tmp_path: Path
) -> None:
    hosted, _ = federation.run(AtTheEdge(), fedavg)
    remote, outcomes = federation.run(AtTheEdge(), fedavg, edge_folder=tmp_path)
    assert_equal(remote, hosted, tolerance=0)
    assert "backhaul-up" not in outcomes[1].turns[0].link_bytes


def test_an_edge_that_fails_drops_its_own_devices_only(
    federation: Federation, fedavg: Strategy, tmp_path: Path
) -> None:
    def disturb(message: Message, node: int) -> None:
        kind = message.metadata.message_type
        if kind == "train.edge" and node == N_DEVICES + 1:
            raise RuntimeError("power cut")

    _, outcomes = federation.run(
        Edges([[0], [1], [2], [3]]), fedavg, disturb=disturb, edge_folder=tmp_path
    )
    assert [turn.turn.device for turn in outcomes[1].turns] == [0, 2]
    failed = [failure.who for failure in outcomes[1].failures if failure.phase == "train"]
    assert failed[0] == "edge 1"
    assert sorted(failed[1:]) == ["device 1", "device 3"]
    assert all("power cut" in failure.reason for failure in outcomes[1].failures)


def test_an_edge_does_not_wait_for_a_device_that_never_comes(
    federation: Federation, fedavg: Strategy, tmp_path: Path
) -> None:
    def disturb(message: Message, node: int) -> None:
        if message.metadata.message_type == "train.device" and node == 1:
            raise RuntimeError("battery empty")

    _, outcomes = federation.run(
        Edges([[0], [1], [2], [3]]),
        fedavg,
        disturb=disturb,
        edge_folder=tmp_path,
        patience=Patience(deadline_s=60),
    )
    assert [failure.who for failure in outcomes[1].failures] == ["device 1"]
    assert {turn.turn.device for turn in outcomes[1].turns} == {0, 2, 3}
    assert outcomes[1].wall_s < 30, "device 3 needs its edge's answer"


def test_a_missing_edge_is_named_before_training(
    federation: Federation, fedavg: Strategy, tmp_path: Path
) -> None:
    class Third(Edges):
        def plan_round(self, scene: Scene) -> RoundPlan:
            plan = super().plan_round(scene)
            return RoundPlan.parallel(
                replace(turn, edge=7) for branch in plan.branches for turn in branch.turns
            )

    with pytest.raises(FedsplitError, match="device 0: edge=7: must be from 0 to 1"):
        federation.run(Third([[0], [1], [2], [3]]), fedavg, edge_folder=tmp_path)
    session._load_data.cache_clear()
