"""How the examples of a data set are divided over devices.

Every function returns one ascending index array per device; together they hold every example
once. They depend on their arguments only, so every node comes to the same division.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsplit.data.partitioners import FLWR_PARTITIONERS, by_partitioner
from fedsplit.errors import require, require_choice

Indices = NDArray[np.int64]

PARTITIONS = ("natural", "iid", "dirichlet", "shard")
LOCAL = "local"
"""No division at all: every device has files of its own."""

__all__ = ["FLWR_PARTITIONERS", "LOCAL", "PARTITIONS", "Indices", "divide"]


def divide(
    groups: Indices,
    n_devices: int,
    partition: str | Mapping[str, Any],
    rng: np.random.Generator,
    *,
    alpha: float = 0.5,
    shards_per_device: int = 2,
    min_samples: int = 1,
    label: str | None = None,
) -> list[Indices]:
    """Divide examples over devices and see to it that none holds too few.

    A device that `partition` leaves with fewer than `min_samples` examples is given some of
    whichever device then holds most.

    Parameters
    ----------
    groups : array of int, shape [n_examples]
        Class or origin of each example.
    n_devices : int
        Devices to divide over.
    partition : str or mapping
        One of `PARTITIONS`, or a partitioner of flwr-datasets: its name under ``_target_`` and its
        settings.
    rng : numpy.random.Generator
        Source of every draw.
    alpha, shards_per_device : float, int
        Settings of "dirichlet" and "shard".
    min_samples : int
        Examples that every device holds at least.
    label : str or None
        Name of what `groups` are, for the ``partition_by`` of a partitioner.

    Raises
    ------
    FedsplitError
        If the partition is unknown or does not fit the examples, or there are fewer than
        ``n_devices * min_samples`` examples.
    """
    ways: dict[str, Callable[[], list[Indices]]] = {
        "natural": lambda: natural(groups, n_devices),
        "iid": lambda: iid(len(groups), n_devices, rng),
        "dirichlet": lambda: dirichlet(groups, n_devices, alpha, rng),
        "shard": lambda: shard(groups, n_devices, shards_per_device, rng),
    }
    require(n_devices >= 1, "fleet.devices", n_devices, "at least 1")
    allowed = f"at most {len(groups)}, all the examples that there are"
    require(len(groups) >= min_samples, "data.min_samples", min_samples, allowed)
    require(
        len(groups) >= n_devices * min_samples,
        "fleet.devices",
        n_devices,
        f"at most {len(groups) // min_samples}: "
        f"there are {len(groups)} examples and each device needs {min_samples}",
    )
    if isinstance(partition, Mapping):
        shares = by_partitioner(partition, groups, n_devices, rng, label=label)
    else:
        require_choice("data.partition", partition, PARTITIONS)
        shares = ways[partition]()
    return _top_up(shares, min_samples, rng)


def natural(groups: Indices, n_devices: int) -> list[Indices]:
    """Deal whole groups to the devices in turn: with two devices, groups 0, 2, ... and 1, 3, ...

    With more devices than groups, the devices that share a group hold neighbouring parts of it.
    """
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    if n_devices <= len(members):
        return [np.sort(np.concatenate(members[d::n_devices])) for d in range(n_devices)]
    shares: list[Indices] = [np.empty(0, np.int64)] * n_devices
    for group, indices in enumerate(members):
        owners = range(group, n_devices, len(members))
        for owner, part in zip(owners, np.array_split(indices, len(owners)), strict=True):
            shares[owner] = part
    return shares


def iid(n_examples: int, n_devices: int, rng: np.random.Generator) -> list[Indices]:
    """Give every device the same number (or one fewer) of randomly drawn examples."""
    return [np.sort(part) for part in np.array_split(rng.permutation(n_examples), n_devices)]


def dirichlet(
    groups: Indices, n_devices: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    """Divide each group in proportions drawn from a symmetric Dirichlet(`alpha`) distribution.

    Source: Hsu, Qi and Brown, "Measuring the effects of non-identical data distribution for
    federated visual classification", 2019, with the draw made once for each class.
    """
    shares: list[list[Indices]] = [[] for _ in range(n_devices)]
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        ends = np.cumsum(rng.dirichlet(np.full(n_devices, alpha)))[:-1] * len(members)
        for share, part in zip(shares, np.split(members, ends.astype(np.int64)), strict=True):
            share.append(part)
    return [np.sort(np.concatenate(share)) for share in shares]


def shard(
    groups: Indices, n_devices: int, shards_per_device: int, rng: np.random.Generator
) -> list[Indices]:
    """Sort by group, cut in equal shards, and give every device `shards_per_device` random ones.

    Source: McMahan et al., "Communication-efficient learning of deep networks from decentralized
    data", AISTATS 2017, section 3.
    """
    shards = np.array_split(np.argsort(groups, kind="stable"), n_devices * shards_per_device)
    dealt = rng.permutation(len(shards)).reshape(n_devices, shards_per_device)
    return [np.sort(np.concatenate([shards[i] for i in mine])) for mine in dealt]


def _top_up(shares: list[Indices], min_samples: int, rng: np.random.Generator) -> list[Indices]:
    """Move examples from the largest shares until each holds `min_samples`."""
    shares = list(shares)
    for poor, share in enumerate(shares):
        while len(share) < min_samples:
            rich = max(range(len(shares)), key=lambda device: len(shares[device]))
            given = rng.integers(len(shares[rich]))
            share = np.sort(np.append(share, shares[rich][given]))
            shares[rich] = np.delete(shares[rich], given)
            shares[poor] = share
    return shares
