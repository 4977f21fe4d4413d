"""What a process keeps of the data of the devices that it plays."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict

from fedsplit.flower.node import device as module
from fedsplit.flower.node.device import Device

ROWS = [{"input_ids": torch.zeros(4, dtype=torch.long)}] * 3
JOB: Any = SimpleNamespace(data_text="", data=None)


def context(device: int) -> Context:
    return Context(1, device, {"partition-id": device}, RecordDict(), {})


def test_a_device_s_data_are_loaded_once_and_those_of_thousands_are_not_all_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device of few samples takes memory by itself; the oldest go first."""
    loaded: list[int] = []

    def load(given: Context) -> tuple[Any, Any]:
        loaded.append(given.node_id)
        return ROWS, ROWS

    monkeypatch.setattr(module, "_KEPT", 1060)  # ten devices of six samples
    device = Device(load)
    for index in (*range(10), *range(10)):
        device._data(JOB, context(index))
    assert loaded == [*range(10)]
    device._data(JOB, context(10))
    assert len(device._kept) == 10
    device._data(JOB, context(9))
    device._data(JOB, context(0))
    assert loaded == [*range(11), 0]
