"""Adapter sets that wait on disk: the strategy gets the same bits, and needs little memory."""

import tracemalloc

import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, Krum
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.flower.messages import to_record
from fedsplit.flower.server.spool import Spool, Spooled

SETS, BIG = 12, 200_000


def adapters(size: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(size, generator=draw),
        "b": torch.randn(3, 4, 5, generator=draw)[:, ::2],
        "statistics": torch.randn(7, generator=draw, dtype=torch.float64),
        "one": torch.randn((), generator=draw),
    }


def replies(sets: list[dict[str, Tensor]] | list[Spooled]) -> list[Message]:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    made = []
    for index, one in enumerate(sets):
        record = one.record() if isinstance(one, Spooled) else to_record(one)
        metrics = MetricRecord({"num-examples": 3 + index, "loss": 1.0})
        asked = Message(RecordDict(), index + 1, "train")
        content = RecordDict({"arrays": record, "metrics": metrics})
        made.append(Message(content, reply_to=asked))
    return made


@pytest.mark.parametrize("kind", [FedAvg, FedAvgM, FedAdam, FedMedian, FedTrimmedAvg, Krum])
def test_every_strategy_computes_the_same_bits(kind: type[FedAvg]) -> None:
    sets = [adapters(100, seed) for seed in range(SETS)]
    spool = Spool()
    results = []
    for given in (sets, [spool.put(one) for one in sets]):
        strategy = kind()
        if hasattr(strategy, "current_arrays"):
            start = to_record(adapters(100, 99))
            whole = isinstance(strategy, FedAvgM)
            strategy.current_arrays = start if whole else {k: v.numpy() for k, v in start.items()}
        aggregated, _ = strategy.aggregate_train(1, replies(given))  # type: ignore[arg-type]
        assert aggregated is not None
        results.append(aggregated.to_torch_state_dict())
    in_memory, on_disk = results
    assert in_memory.keys() == on_disk.keys()
    for name, tensor in in_memory.items():
        assert torch.equal(tensor, on_disk[name])


def test_an_average_needs_the_memory_of_one_array() -> None:
    def peak_bytes(count: int) -> int:
        tracemalloc.start()
        try:
            spool, strategy = Spool(), FedAvg()
            kept = [spool.put(adapters(BIG, seed)) for seed in range(count)]
            strategy.aggregate_train(1, replies(kept))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(2 * SETS) < peak_bytes(SETS) + 2 * BIG


def test_what_is_read_is_what_was_written() -> None:
    spool = Spool()
    first, second = spool.put(adapters(10, 1)), spool.put(adapters(10, 2))
    del spool  # its file lasts as long as they do
    for read, seed in ((second, 2), (first, 1)):
        for name, tensor in adapters(10, seed).items():
            assert torch.equal(read[name], tensor)


def test_a_full_disk_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool()
    monkeypatch.setattr(spool, "_file", open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(FedsplitError, match="TMPDIR=.*cannot hold the adapters of a round"):
        spool.put(adapters(BIG, 0))
