"""Whole rounds in one process, on a tiny language model."""

from pathlib import Path

import pytest
from flwr.serverapp.strategy import FedAvg, Strategy

from fedsplit.data import DataSpec
from fedsplit.models import ModelSpec
from fedsplit.testing.federation import N_DEVICES, Federation

__all__ = ["N_DEVICES", "Federation"]


@pytest.fixture(scope="session")
def federation(tiny_checkpoint: Path, tiny_text: Path) -> Federation:
    """Return a federation of four devices with different data."""
    return Federation(
        ModelSpec(source=str(tiny_checkpoint), r=2, target_modules="all-linear"),
        DataSpec(source="text", path=str(tiny_text), seq_len=16, min_samples=4),
    )


@pytest.fixture
def fedavg() -> Strategy:
    """Return FedAvg over whoever is there."""
    return FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
