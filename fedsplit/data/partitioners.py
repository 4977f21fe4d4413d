"""Flower's own partitioners (flwr-datasets), by name."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.errors import FedsplitError, require

FLWR_PARTITIONERS = "flwr_datasets.partitioner."
"""What ``data.partition._target_`` begins with: a server cannot name other code to its devices."""

_GROUP = "group"


def by_partitioner(
    settings: Mapping[str, Any],
    groups: NDArray[np.int64],
    n_devices: int,
    rng: np.random.Generator,
    *,
    label: str | None = None,
) -> list[NDArray[np.int64]]:
    """Divide examples by a partitioner of flwr-datasets.

    Parameters
    ----------
    settings : mapping
        ``_target_``, such as "flwr_datasets.partitioner.DirichletPartitioner", and its arguments.
        What is left out is filled in: ``num_partitions`` by `n_devices`, ``partition_by`` by the
        examples' groups, ``seed`` by a draw of `rng`.
    groups : array of int, shape [n_examples]
        Class or origin of each example; a column named "group", and `label` where given.
    n_devices : int
        Devices to divide over.
    rng : numpy.random.Generator
        Where the seed comes from.
    label : str or None
        Another name that ``partition_by`` may give to `groups`.

    Returns
    -------
    list of int arrays
        Ascending examples of each device.

    Raises
    ------
    FedsplitError
        If flwr-datasets is not installed, has no such partitioner, or refuses its settings.
    """
    target = str(settings["_target_"])
    make = _partitioner(target)
    accepted = inspect.signature(make).parameters
    given = {str(name): value for name, value in settings.items() if name != "_target_"}
    for name in given:
        known = f"one of {', '.join(accepted)}"
        require(name in accepted, "data.partition", name, known)
    filled = {
        "num_partitions": n_devices,
        "partition_by": _GROUP,
        "seed": int(rng.integers(2**31)),
    }
    missing = {name: value for name, value in filled.items() if name in accepted}
    import datasets

    columns = {"index": np.arange(len(groups)), _GROUP: groups}
    if label is not None:
        columns.setdefault(label, groups)
    try:
        partitioner = make(**{**missing, **given})
        partitioner.dataset = datasets.Dataset.from_dict(columns)
        found = partitioner.num_partitions
        require(found == n_devices, "fleet.devices", n_devices, f"{found}, the parts of {target}")
        parts = [partitioner.load_partition(device)["index"] for device in range(n_devices)]
    except FedsplitError:
        raise
    except Exception as error:
        raise FedsplitError(f"data.partition._target_={target!r}: {error}") from error
    return [np.sort(np.asarray(part, np.int64)) for part in parts]


def _partitioner(target: str) -> Any:
    try:
        from flwr_datasets import partitioner
    except ImportError as error:
        raise FedsplitError(
            f"data.partition._target_={target!r} needs flwr-datasets: "
            "pip install 'fedsplit[partitioners]'"
        ) from error
    name = target.removeprefix(FLWR_PARTITIONERS)
    known = [item for item in partitioner.__all__ if item != "Partitioner"]
    require(name in known, "data.partition._target_", target, f"one of {', '.join(known)}")
    return getattr(partitioner, name)
