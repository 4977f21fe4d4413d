"""Nodes that are processes of their own, killed or frozen: noticed within 5 s, in every phase."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from benchmarks._faults import DEVICES, Fault
from benchmarks.faults import Federation, Outcome
from fedsplit.flower.messages import EVALUATE, TRAIN

NOTICED_WITHIN_S = 5.0
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Return a federation of four device and two edge processes."""
    with ExitStack() as stack:
        yield Federation(Path(tmp_path_factory.mktemp("faults")), stack)


@pytest.fixture(scope="module")
def undisturbed(processes: Federation) -> Outcome:
    """Return a round of training that nothing happens to."""
    outcome = processes.round(TRAIN)
    assert not outcome.failures
    return outcome


@pytest.mark.parametrize(
    ("phase", "kind", "node"),
    [
        pytest.param("start", "freeze", 0, id="device-frozen-before-its-link-opens"),
        pytest.param("end", "kill", 1, id="device-killed-after-its-last-step"),
        pytest.param("step", "kill", DEVICES, id="edge-killed-in-a-step"),
        pytest.param("start", "malformed", 2, id="device-answers-before-its-edge-hears-of-it"),
        pytest.param("start", "kill", 2, marks=slow),
        pytest.param("step", "kill", 3, marks=slow),
        pytest.param("step", "freeze", 0, marks=slow),
        pytest.param("end", "freeze", 1, marks=slow),
        pytest.param("start", "kill", DEVICES + 1, marks=slow),
        pytest.param("end", "freeze", DEVICES + 1, marks=slow),
    ],
)
def test_a_fault_is_noticed_at_once_and_hits_nobody_else(
    processes: Federation, undisturbed: Outcome, phase: str, kind: str, node: int
) -> None:
    fault = Fault(node, TRAIN, phase, kind)
    outcome = processes.round(TRAIN, fault)
    assert outcome.struck_unix_s is not None
    for failure in outcome.failures:
        assert failure.unix_s is not None
        assert failure.unix_s - outcome.struck_unix_s < NOTICED_WITHIN_S
    failed = {failure.who for failure in outcome.failures}
    assert f"{fault.role} {node % DEVICES}" in failed
    assert {f"device {device}" for device in fault.hits} <= failed | {
        f"device {device}" for device in outcome.results
    }
    spared = set(range(DEVICES)) - fault.hits
    assert spared <= outcome.results.keys()
    for device in spared:
        for name, tensor in undisturbed.results[device].items():
            assert torch.equal(outcome.results[device][name], tensor), name


@slow
def test_a_fault_in_evaluation_is_noticed_too(processes: Federation) -> None:
    outcome = processes.round(EVALUATE, Fault(1, EVALUATE, "start", "kill"))
    assert [failure.who for failure in outcome.failures] == ["device 1"]
    assert outcome.failures[0].unix_s is not None
    assert outcome.struck_unix_s is not None
    assert outcome.failures[0].unix_s - outcome.struck_unix_s < NOTICED_WITHIN_S
    assert outcome.results.keys() == {0, 2, 3}
