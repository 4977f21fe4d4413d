"""A node that was measured says so, and is planned for as it is."""

from pathlib import Path

import pytest
from fedsplit.strategies.splitfed import SplitFed
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedsplit.flower import client_app
from fedsplit.flower.messages import HELLO
from fedsplit.models.profile_measured import measure_machine
from fedsplit.plan import RoundPlan
from fedsplit.schemes import Scene
from tests.flower.conftest import Federation

MEASURED = 2


class Watching(SplitFed):
    """Keeps how fast the devices of its rounds are."""

    def plan_round(self, scene: Scene) -> RoundPlan:
        self.seen = scene.fleet.devices.flops, scene.profile
        return super().plan_round(scene)


def test_the_plan_takes_a_device_s_own_file(federation: Federation, tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    machine = measure_machine(federation.job.model, seq_len=16, batch=2, repeats=1)
    machine.write(file)
    honest, app = client_app(), ClientApp()

    @app.query("node")
    def hello(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == MEASURED:
            context.node_config["profile"] = str(file)
        return honest(message, context)

    assert HELLO == "query.node"
    for kind in ("train", "evaluate"):
        getattr(app, kind)("device")(honest)
    scheme = Watching(cut=1)
    federation.run(scheme, app=app)
    speeds, profile = scheme.seen
    assert speeds[MEASURED] == pytest.approx(machine.flops_per_s(profile))
    assert len({*speeds[:MEASURED], *speeds[MEASURED + 1 :]}) == 1
