"""A run that is interrupted goes on as if it had not been."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAdam, FedAvg, Strategy

from fedsplit.errors import FedsplitError
from fedsplit.flower.checkpoint import (
    Checkpoint,
    load_checkpoint,
    restore_strategy,
    save_checkpoint,
    strategy_state,
)
from strategies.splitfed import SplitFed
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
    def scheme() -> SplitFed:
        inner = kind(
            fraction_train=0.5, min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1
        )
        return SplitFed(cut=1, inner=inner)

    whole, outcomes = federation.run(scheme(), rounds=2, steps=1)

    interrupted = scheme()
    adapters, _ = federation.run(interrupted, rounds=1, steps=1)
    save_checkpoint(tmp_path, Checkpoint(1, adapters, strategy_state(interrupted.inner)))

    resumed = scheme()
    saved = load_checkpoint(tmp_path)
    restore_strategy(resumed.inner, saved.strategy)
    again, rest = federation.run(
        resumed, rounds=2, steps=1, adapters=saved.adapters, first_round=saved.server_round + 1
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


def test_a_kill_while_writing_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, checkpoint(1))

    def killed(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedsplit.flower.checkpoint.save_file", killed)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(tmp_path, checkpoint(2))
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
