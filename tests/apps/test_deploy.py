"""The commands of a topology, and the files that ship with them."""

import shlex
from io import StringIO
from pathlib import Path

import pytest
import yaml
from fedsplit.apps.config import load_config
from fedsplit.apps.launch.deploy import (
    deploy,
    overrides,
    read_topology,
    register_commands,
    run_command,
    superlink_command,
    supernode_command,
)
from fedsplit.apps.link_config import link_settings
from fedsplit.apps.run_settings import run_settings
from flwr.common.config import parse_config_args
from rich.console import Console

from fedsplit.errors import FedsplitError
from fedsplit.flower import LinkSettings

ROOT = Path(__file__).parents[2]
SECURE = {
    "superlink": "cloud.example.org:8000",
    "link": {"bind": "0.0.0.0:7000", "advertise": "cloud.example.org:7000"},
    "edges": [{"bind": "0.0.0.0:7100", "advertise": "edge.example.org:7100"}],
    "devices": 2,
    "certificates": {
        "root": "/certs/ca.crt",
        "certificate": "/certs/{node}.crt",
        "key": "/certs/{node}.key",
        "login": "/certs/{node}.login",
    },
    "overrides": ["strategy=splitllm", "rounds=2"],
}


def write(folder: Path, **changes: object) -> Path:
    file = folder / "topology.yaml"
    file.write_text(yaml.safe_dump({"folder": str(folder / "deployment"), **SECURE, **changes}))
    return file


def node_config(command: list[str]) -> dict[str, object]:
    return dict(parse_config_args([command[command.index("--node-config") + 1]]))


def test_flower_reads_the_settings_of_every_node(tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path))
    assert topology.nodes() == ("edge-0", "device-0", "device-1")
    edge = node_config(supernode_command(topology, "edge-0"))
    assert edge["role"] == "edge"
    assert edge["edge-id"] == 0
    assert LinkSettings.of_node(edge) == LinkSettings(
        "0.0.0.0:7100",
        "edge.example.org:7100",
        "/certs/edge-0.crt",
        "/certs/edge-0.key",
        "/certs/ca.crt",
    )
    device = node_config(supernode_command(topology, "device-1"))
    assert device["partition-id"] == 1
    assert LinkSettings.of_node(device).bind is None, "devices only dial out"
    ports = {command[command.index("--port") + 1] for command in _nodes(topology)}
    assert len(ports) == 3


def _nodes(topology: object) -> list[list[str]]:
    return [supernode_command(topology, node) for node in topology.nodes()]  # type: ignore[attr-defined]


def test_the_run_configures_the_server_end_of_the_link(tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path))
    command = run_command(topology)
    settings = parse_config_args([command[command.index("--run-config") + 1]])
    config = load_config(shlex.split(str(settings["hydra"])))
    assert list(shlex.split(str(settings["hydra"]))) == overrides(topology)
    assert config.strategy.name == "splitllm"
    assert config.fleet.devices == 2
    assert config.fleet.edges == 1
    assert run_settings(config).edge_nodes
    assert link_settings(config).security == "mutual"
    assert link_settings(config).advertise == "cloud.example.org:7000"
    assert link_settings(config).login == "/certs/{node}.login.pub"


def test_without_certificates_everything_says_so(tmp_path: Path) -> None:
    topology = read_topology(write(tmp_path, certificates=None))
    for command in (superlink_command(topology), *_nodes(topology)):
        assert "--insecure" in command
    assert register_commands(topology) == []


def test_every_command_is_printed_as_a_shell_reads_it(tmp_path: Path) -> None:
    text = StringIO()
    assert deploy(write(tmp_path), False, Console(file=text, width=80)) == 0
    topology = read_topology(tmp_path / "topology.yaml")
    printed = [shlex.split(line) for line in text.getvalue().splitlines() if line[:1] != "#"]
    wanted = [
        superlink_command(topology),
        *register_commands(topology),
        *_nodes(topology),
        run_command(topology),
    ]
    assert all(command in printed for command in wanted)
    assert (tmp_path / "deployment" / "app" / "pyproject.toml").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"superlink": "cloud"}, "superlink"),
        ({"devices": 0}, "devices"),
        ({"edges": [{"bind": "0.0.0.0:1"}]}, "edges: link.advertise"),
        ({"link": {"port": 1}}, "link"),
        ({"overrides": ["strategy=nonsense"]}, "strategy"),
    ],
)
def test_a_wrong_topology_is_refused_before_anything_starts(
    changes: dict[str, object], named: str, tmp_path: Path
) -> None:
    with pytest.raises(FedsplitError, match=named):
        deploy(write(tmp_path, **changes), True, Console(file=StringIO()))
    assert not (tmp_path / "deployment").exists()


def test_the_example_is_a_topology() -> None:
    topology = read_topology(ROOT / "conf" / "deploy" / "example.yaml")
    assert load_config(overrides(topology)).fleet.edges == len(topology.edges) == 2


def test_the_compose_file_is_a_cloud_two_edges_and_four_devices() -> None:
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    roles = [
        node_config(command)["role"]
        for service in services.values()
        if "--node-config" in (command := shlex.split(str(service["command"])))
    ]
    assert sorted(roles) == ["device"] * 4 + ["edge"] * 2
    assert "flower-superlink" in services["cloud"]["command"]
    for service in services.values():
        assert service.get("build") == {"context": "..", "dockerfile": "deploy/Dockerfile"}
    assert (ROOT / "deploy" / "Dockerfile").read_text().startswith("FROM ")
