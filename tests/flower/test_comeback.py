"""Who failed takes part again; and a run stops when too few are left."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fedsplit.apps.client_app import app as client_app
from fedsplit.strategies.splitfed import SplitFed
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp.strategy import Strategy

from fedsplit.errors import FedsplitError
from fedsplit.flower.server.roster import Joiners, discover
from fedsplit.testing.grid import FIRST_NODE, N_EDGES, ThreadGrid
from tests.flower.conftest import N_DEVICES, Federation


def test_a_device_that_failed_takes_part_in_the_next_round(
    federation: Federation, fedavg: Strategy
) -> None:
    trainings: list[int] = []

    def disturb(message: Message, device: int) -> None:
        if message.metadata.message_type.startswith("train") and device == 1:
            trainings.append(device)
            if len(trainings) == 1:
                raise RuntimeError("battery empty")

    _, outcomes = federation.run(SplitFed(cut=2), fedavg, rounds=2, disturb=disturb)
    _, first, second = outcomes
    assert [failure.who for failure in first.failures] == ["device 1"]
    assert not second.failures
    assert {turn.turn.device for turn in second.turns} == set(range(N_DEVICES))


def test_a_node_that_was_started_again_gets_its_old_place(
    federation: Federation, tmp_path: Path
) -> None:
    """To Flower it is a new node, and the one that it replaces may still be listed for a while."""
    grid = ThreadGrid(client_app, N_DEVICES, edge_folder=tmp_path)
    before = discover(grid, federation.job, N_EDGES)
    device, edge = before.by_index(1), before.edges[0]
    lost = replace(
        before,
        nodes=tuple(replace(node, node_id=1) if node == device else node for node in before.nodes),
        edges=tuple(replace(node, node_id=2) if node == edge else node for node in before.edges),
    )
    joiners = Joiners(grid, federation.job, N_EDGES)
    back = lost
    while (back.nodes, back.edges) != (before.nodes, before.edges):
        joiners.tick(back)
        back = joiners.seat(back, ())
    assert {1, 2} <= back.refused
    joiners.tick(back)
    assert joiners.seat(back, ()) == back, "nobody else joined"


def test_nobody_takes_the_place_of_a_node_that_is_still_there(federation: Federation) -> None:
    """Two more nodes join and say they are devices 0 and 1; only 1 was lost with its task."""
    grid = ThreadGrid(client_app, N_DEVICES)
    roster = discover(grid, federation.job)
    first, second = roster.by_index(0), roster.by_index(1)
    others = tuple(node for node in roster.nodes if node.index > 1)
    # To the run, devices 0 and 1 are other nodes, which are listed too.
    held = replace(roster, nodes=(replace(first, node_id=1), replace(second, node_id=2), *others))
    listed = set(grid.get_node_ids()) | {1, 2}
    grid.get_node_ids = lambda: listed  # type: ignore[method-assign]
    joiners, back = Joiners(grid, federation.job), held
    while not {first.node_id, second.node_id} <= back.refused | back.node_ids:
        joiners.tick(held)
        back = joiners.seat(back, gone={2})
    assert back.by_index(0).node_id == 1
    assert back.by_index(1).node_id == second.node_id


def test_a_second_node_of_one_index_is_left_out_and_stops_nobody(federation: Federation) -> None:
    """Without login keys, who came first has the place."""
    grid = ThreadGrid(client_app, N_DEVICES + 1)
    job = replace(federation.job, n_devices=N_DEVICES + 1)
    grid._node_config = lambda node: {"partition-id": min(node, N_DEVICES - 1)}  # type: ignore
    with pytest.raises(FedsplitError, match=r"device 4 is missing \(left out: device 3 is another"):
        discover(grid, job)
    roster = discover(grid, federation.job)
    assert [node.index for node in roster.nodes] == list(range(N_DEVICES))


def _logged_in(grid: ThreadGrid, keys: dict[int, bytes], absent: set[int]) -> None:
    """Have nodes show these keys, as Flower tells them; `absent` are not connected."""
    named = [FIRST_NODE + node for node in keys]
    grid.get_node_ids = lambda: [n for n in named if n - FIRST_NODE not in absent]  # type: ignore
    grid.get_nodes = lambda: [  # type: ignore
        NodeInfo(node_id=number, public_key=keys[number - FIRST_NODE])
        for number in grid.get_node_ids()
    ]


def test_an_index_belongs_to_the_node_with_its_login_key(federation: Federation) -> None:
    """Node 4, with a key of its own, says that it is device 1: before that comes, and after."""
    keys = {node: f"key {node}".encode() for node in range(N_DEVICES + 1)}
    grid = ThreadGrid(client_app, N_DEVICES + 1)
    grid._node_config = lambda node: {"partition-id": node if node < N_DEVICES else 1}  # type: ignore
    absent = {1}
    _logged_in(grid, keys, absent)
    owners = {("device", index): keys[index] for index in range(N_DEVICES)}

    def come() -> None:
        absent.clear()

    threading.Timer(0.5, come).start()
    roster = discover(grid, federation.job, 0, owners)
    assert roster.by_index(1).node_id == FIRST_NODE + 1
    assert roster.refused == {FIRST_NODE + N_DEVICES}

    # Its rightful node is lost with its task and not connected any more; the place is kept free.
    absent.add(1)
    joiners = Joiners(grid, federation.job, 0, owners)
    unknown = replace(roster, refused=frozenset())
    deadline = time.monotonic() + 30
    while not (seated := joiners.seat(unknown, gone={FIRST_NODE + 1})).refused:
        assert time.monotonic() < deadline
        joiners.tick(unknown)
        time.sleep(0.01)
    assert seated.by_index(1).node_id == FIRST_NODE + 1
    assert joiners.left_out == ["device 1 has another login key"]


@pytest.mark.parametrize("quorum", [2, 3])
def test_a_round_with_fewer_survivors_than_its_quorum_stops_the_run(
    federation: Federation, fedavg: Strategy, quorum: int
) -> None:
    def disturb(message: Message, device: int) -> None:
        if message.metadata.message_type.startswith("train") and device in (0, 3):
            raise RuntimeError("battery empty")

    if quorum == 2:
        _, outcomes = federation.run(SplitFed(cut=2), fedavg, disturb=disturb, quorum=quorum)
        assert {turn.turn.device for turn in outcomes[1].turns} == {1, 2}
    else:
        with pytest.raises(FedsplitError, match=r"round 1: 2 of 4 branches finished .*device 0"):
            federation.run(SplitFed(cut=2), fedavg, disturb=disturb, quorum=quorum)
