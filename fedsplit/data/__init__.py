"""Data sets: sources, their division over devices, and batches of samples."""

from fedsplit.data.access import confine
from fedsplit.data.counts import Counts, DeviceCounts, describe
from fedsplit.data.federated import (
    DeviceData,
    FederatedData,
    load_data,
    load_device,
    load_test,
)
from fedsplit.data.partition import PARTITIONS
from fedsplit.data.samples import (
    Batch,
    RowSamples,
    Samples,
    TokenSamples,
    batches,
    draw,
    training_batches,
)
from fedsplit.data.spec import SOURCES, DataSpec
from fedsplit.data.tokens import first_sample, prompt_tokens

__all__ = [
    "PARTITIONS",
    "SOURCES",
    "Batch",
    "Counts",
    "DataSpec",
    "DeviceCounts",
    "DeviceData",
    "FederatedData",
    "RowSamples",
    "Samples",
    "TokenSamples",
    "batches",
    "confine",
    "describe",
    "draw",
    "first_sample",
    "load_data",
    "load_device",
    "load_test",
    "prompt_tokens",
    "training_batches",
]
