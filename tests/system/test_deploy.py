"""A deployment as a user starts it: SuperLink, edges and devices as processes of their own.

Everything speaks TLS on loopback, nodes log in at the SuperLink and prove themselves on the link.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from fedsplit.apps.launch.flower_tools import free_ports
from safetensors.torch import load_file

from fedsplit.report import read_turns
from tests.certificates import Authority, login_key

# Flower starts a process for every message: some thirty times four seconds of one core.
pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(900)]

EDGES, DEVICES = 2, 4


def fedsplit(*arguments: str, cwd: Path, patience_s: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "fedsplit.apps", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=patience_s,
        check=False,
    )


def consecutive_ports(count: int) -> int:
    """Return the first of `count` ports in a row that nobody listens on."""
    for _ in range(100):
        (first,) = free_ports(1)
        listening = {item.laddr.port for item in psutil.net_connections("tcp")}
        if first + count < 1 << 16 and listening.isdisjoint(range(first, first + count)):
            return first
    raise RuntimeError("no free ports")


@pytest.fixture(scope="module")
def job(tiny_checkpoint: Path, tiny_text: Path) -> list[str]:
    """Return the overrides of a three-tier job that takes seconds of training."""
    return [
        "strategy=splitllm",
        "strategy.device_cut=1",
        "strategy.edge_cut=2",
        f"model={tiny_checkpoint}",
        "model.r=2",
        "data=text",
        f"data.path={tiny_text}",
        "data.seq_len=16",
        "data.min_samples=4",
        "data.partition=iid",
        "train.batch_size=2",
        "train.steps=2",
        "rounds=2",
        "evaluate.every=2",
        "run.accelerator=cpu",
    ]


@pytest.fixture
def topology(job: list[str], tmp_path: Path) -> Path:
    """Return a topology file on free ports, with certificates for every node."""
    certificates = tmp_path / "certificates"
    certificates.mkdir()
    authority = Authority(certificates)
    authority.issue("server")
    for role, count in (("edge", EDGES), ("device", DEVICES)):
        for index in range(count):
            authority.issue(f"{role}-{index}")
            login_key(certificates / f"{role}-{index}.login")
    superlink, cloud, *edges = free_ports(2 + EDGES)
    file = tmp_path / "topology.yaml"
    values = {
        "superlink": f"127.0.0.1:{superlink}",
        "link": {"bind": f"0.0.0.0:{cloud}", "advertise": f"127.0.0.1:{cloud}"},
        "edges": [{"bind": f"127.0.0.1:{port}"} for port in edges],
        "devices": DEVICES,
        "certificates": {
            "root": str(certificates / "ca.crt"),
            "certificate": str(certificates / "{node}.crt"),
            "key": str(certificates / "{node}.key"),
            "login": str(certificates / "{node}.login"),
        },
        "node_ports": consecutive_ports(EDGES + DEVICES),
        "folder": str(tmp_path / "deployment"),
        "overrides": job,
    }
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize("edge_rounds", [0, 2])
def test_a_deployment_ends_with_the_adapters_of_the_simulation(
    topology: Path, job: list[str], tmp_path: Path, edge_rounds: int
) -> None:
    job = [*job, f"strategy.edge_rounds={edge_rounds}"]
    values = yaml.safe_load(topology.read_text())
    topology.write_text(yaml.safe_dump({**values, "overrides": job}))
    deployed = tmp_path / "deployed"
    result = fedsplit(
        "deploy", str(topology), "--start", "--output", str(deployed), cwd=tmp_path, patience_s=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert not [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(tmp_path) in word for word in process.info["cmdline"] or ())
    ], "every process is stopped"

    simulated = fedsplit(
        *("run", *job, f"fleet.devices={DEVICES}", f"fleet.edges={EDGES}", "output=simulated"),
        cwd=tmp_path,
        patience_s=300,
    )
    assert simulated.returncode == 0, simulated.stdout + simulated.stderr
    found, expected = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (deployed, tmp_path / "simulated")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    rounds = json.loads((deployed / "results.json").read_text())["rounds"]
    assert [record["failures"] for record in rounds] == [[], [], []]
    assert all(record["bytes_up"]["edge"] > 0 for record in rounds)
    fetched = [record["adapter_bytes_down"].get("device", 0) for record in rounds]
    assert [count > 0 for count in fetched] == [False, edge_rounds > 0, edge_rounds > 0]


def test_every_sample_of_every_site_is_trained_on(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Four sites have a file each, of which the server is told neither place nor content."""
    rows = [5 + 2 * index for index in range(DEVICES)]
    for index, count in enumerate(rows):
        folder = tmp_path / f"device-{index}"
        folder.mkdir(mode=0o700)
        lines = (f"site {index} asks {n},answer {n * n}" for n in range(count))
        (folder / "secret.csv").write_text("\n".join(["q,a", *lines, ""]))
    superlink, cloud = free_ports(2)
    topology = {
        "superlink": f"127.0.0.1:{superlink}",
        "link": {"bind": f"127.0.0.1:{cloud}"},
        "devices": DEVICES,
        "data": str(tmp_path / "{node}" / "secret.csv"),
        "sites": [f"clinic {index}" for index in range(DEVICES)],
        "node_ports": consecutive_ports(DEVICES),
        "folder": str(tmp_path / "deployment"),
        "overrides": [
            f"model={tiny_checkpoint}", "model.r=2", "data=text", "data.partition=local",
            "data.prompt_column=q", "data.target_column=a", "data.seq_len=32",
            "data.test_fraction=0.2", "train.batch_size=1", "train.steps=null", "train.epochs=1",
            "strategy=splitfed", "strategy.cut=1", "rounds=1", "run.accelerator=cpu",
        ],
    }  # fmt: skip
    file, output = tmp_path / "topology.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(topology))
    done = fedsplit(
        "deploy", str(file), "--start", "--output", str(output), cwd=tmp_path, patience_s=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((output / "results.json").read_text())
    assert results["rounds"][-1]["participants"] == [0, 1, 2, 3]
    turns = {turn.device: turn for turn in read_turns(output) if turn.phase == "train"}
    for index, count in enumerate(rows):
        held = results["data"]["devices"][str(index)]
        assert held["train-read"] + held["test-read"] == count
        assert turns[index].samples == turns[index].steps == held["train-samples"]
        assert held["train-samples"] + held["test-samples"] == count
        assert turns[index].site == f"clinic {index}"
    told = [path for path in output.rglob("*") if path.is_file()]
    told += [path for path in (tmp_path / "deployment" / "app").rglob("*") if path.is_file()]
    assert not [path for path in told if b"secret" in path.read_bytes()]
