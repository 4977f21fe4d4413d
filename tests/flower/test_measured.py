"""A node that was measured says so, and is planned for as it is."""

from pathlib import Path

import pytest
from fedsplit.strategies.splitfed import SplitFed
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.flower import client_app
from fedsplit.flower.messages import HELLO
from fedsplit.flower.server.roster import discover
from fedsplit.models.profile_measured import measure_machine
from fedsplit.plan import RoundPlan
from fedsplit.schemes import Scene
from fedsplit.testing.grid import N_EDGES, ThreadGrid
from tests.flower.conftest import N_DEVICES, Federation

MEASURED = 2


class Watching(SplitFed):
    """Keeps how fast the devices of its rounds are."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        self.seen = scene.fleet.devices.flops, scene.profile
        return super().plan_round(scene)


def saying(file: Path, key: str, value: int) -> ClientApp:
    """Return an app whose node of that configuration was started with a profile."""
    honest, app = client_app(), ClientApp()

    @app.query("node")
    def hello(message: Message, context: Context) -> Message:
        if context.node_config.get(key) == value:
            context.node_config["profile"] = str(file)
        return honest(message, context)

    assert HELLO == "query.node"
    for kind in ("train", "evaluate"):
        getattr(app, kind)("device")(honest)
    return app


def test_an_edge_s_file_is_its_own(federation: Federation, tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    machine = measure_machine(federation.job.model, seq_len=16, batch=2, repeats=1)
    machine.write(file)
    grid = ThreadGrid(saying(file, "edge-id", 1), N_DEVICES, edge_folder=tmp_path)
    assert discover(grid, federation.job, N_EDGES).profiles == {("edge", 1): machine}


def test_the_plan_takes_a_device_s_own_file(federation: Federation, tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    machine = measure_machine(federation.job.model, seq_len=16, batch=2, repeats=1)
    machine.write(file)
    app = saying(file, "partition-id", MEASURED)
    scheme = Watching(cut=1)
    federation.run(scheme, app=app)
    speeds, profile = scheme.seen
    assert speeds[MEASURED] == pytest.approx(machine.flops_per_s(profile))
    assert len({*speeds[:MEASURED], *speeds[MEASURED + 1 :]}) == 1
