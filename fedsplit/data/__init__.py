"""Data sets: sources, their division over devices, and batches of samples."""

from fedsplit.data.access import confine
from fedsplit.data.counts import Counts, DeviceCounts, describe
from fedsplit.data.federated import DeviceData, FederatedData, load_data, load_device
from fedsplit.data.partition import PARTITIONS
from fedsplit.data.samples import (
    Batch,
    RowSamples,
    Samples,
    TokenSamples,
    batches,
    training_batches,
)
from fedsplit.data.spec import SOURCES, DataSpec
from fedsplit.data.tokens import first_sample

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
    "first_sample",
    "load_data",
    "load_device",
    "training_batches",
]
