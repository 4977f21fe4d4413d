"""Data sets: sources, their division over devices, and batches of samples."""

from fedsplit.data.federated import FederatedData, load_data
from fedsplit.data.partition import PARTITIONS
from fedsplit.data.samples import Batch, RowSamples, Samples, batches, training_batches
from fedsplit.data.sources import SOURCES
from fedsplit.data.spec import DataSpec

__all__ = [
    "PARTITIONS",
    "SOURCES",
    "Batch",
    "DataSpec",
    "FederatedData",
    "RowSamples",
    "Samples",
    "batches",
    "load_data",
    "training_batches",
]
