"""A run that is interrupted goes on as if it had not been."""

import ctypes
import multiprocessing
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from fedsplit.strategies.splitfed import SplitFed
from flwr.serverapp.strategy import FedAdam, FedAvg, Strategy

from fedsplit.errors import FedsplitError
from fedsplit.flower.server.checkpoint import (
    Checkpoint,
    load_checkpoint,
    restore_strategy,
    save_checkpoint,
    strategy_state,
)
from tests.flower.conftest import Federation


def checkpoint(server_round: int) -> Checkpoint:
    return Checkpoint(
        server_round,
        {"a.b": torch.full((2, 3), float(server_round))},
        {"m_t:a.b": np.full((2, 3), server_round, dtype=np.float32)},
    )


@pytest.mark.parametrize("kind", [FedAvg, FedAdam])
def test_a_resumed_run_ends_with_the_same_numbers(
    federation: Federation, tmp_path: Path, kind: type[FedAvg]
) -> None:
    def half() -> FedAvg:
        return kind(
            fraction_train=0.5, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1
        )

    scheme = SplitFed(cut=1)
    whole, outcomes = federation.run(scheme, half(), rounds=2, steps=1)

    interrupted = half()
    adapters, _ = federation.run(scheme, interrupted, rounds=1, steps=1)
    save_checkpoint(tmp_path, Checkpoint(1, adapters, strategy_state(interrupted)))

    resumed = half()
    saved = load_checkpoint(tmp_path)
    restore_strategy(resumed, saved.strategy)
    again, rest = federation.run(
        scheme,
        resumed,
        rounds=2,
        steps=1,
        adapters=saved.adapters,
        first_round=saved.server_round + 1,
    )
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert [outcome.server_round for outcome in rest] == [2]
    assert [turn.loss_sum for turn in rest[0].turns] == [
        turn.loss_sum for turn in outcomes[2].turns
    ]


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    read = load_checkpoint(tmp_path)
    assert read.server_round == 2
    assert torch.equal(read.adapters["a.b"], torch.full((2, 3), 2.0))
    assert read.strategy["m_t:a.b"].tolist() == [[2.0] * 3] * 2


def write_on(folder: Path, counter: ctypes.c_int) -> None:
    """Write one checkpoint after the other; `counter` is the last that was completed."""
    while True:
        save_checkpoint(folder, checkpoint(counter.value + 1))
        counter.value += 1


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.flower.test_checkpoint"])
    counter = processes.RawValue("i", 1)  # whoever is killed would keep a lock
    rng = Random(0)
    for _ in range(6):
        before = counter.value
        writer = processes.Process(target=write_on, args=(tmp_path, counter))
        writer.start()
        while counter.value == before:
            assert writer.is_alive()
            time.sleep(0.001)
        time.sleep(0.02 * rng.random())
        writer.kill()
        writer.join()
        read = load_checkpoint(tmp_path)
        assert read.server_round in (counter.value, counter.value + 1)
        value = float(read.server_round)
        assert torch.equal(read.adapters["a.b"], torch.full((2, 3), value))
        assert read.strategy["m_t:a.b"].tolist() == [[value] * 3] * 2
        counter.value = read.server_round


def test_a_full_disk_leaves_the_previous_one(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails half-way, as there."""
    save_checkpoint(tmp_path, checkpoint(1))
    large = replace(checkpoint(2), adapters={"a.b": torch.zeros(1 << 16)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        with pytest.raises(FedsplitError, match="checkpoint"):
            save_checkpoint(tmp_path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(tmp_path).server_round == 1
    save_checkpoint(tmp_path, checkpoint(3))
    assert load_checkpoint(tmp_path).server_round == 3


def test_a_kill_between_the_two_renames_leaves_the_previous_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    assert load_checkpoint(tmp_path).server_round == 1


def test_no_or_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FedsplitError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / "checkpoint" / "adapters.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(FedsplitError, match="is not a checkpoint"):
        load_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint")


def test_the_state_of_a_wrapped_strategy_is_kept_too() -> None:
    class Wrapper(FedAvg):
        def __init__(self, inner: Strategy) -> None:
            super().__init__()
            self.strategy = inner
            self.clipping_norm = 0.25

    inner = FedAdam()
    inner.m_t = {"w": np.ones(2)}
    wrapped = Wrapper(inner)
    fresh = Wrapper(FedAdam())
    fresh.clipping_norm = 1.0
    restore_strategy(fresh, strategy_state(wrapped))
    assert fresh.clipping_norm == 0.25
    assert isinstance(fresh.strategy, FedAdam)
    assert fresh.strategy.m_t is not None
    assert fresh.strategy.m_t["w"].tolist() == [1, 1]
