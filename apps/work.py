"""What turns train, and how what they trained becomes one, from the configuration."""

from collections.abc import Mapping
from dataclasses import replace

from omegaconf import DictConfig

from fedsplit.errors import require, require_choice
from fedsplit.growth import require_room
from fedsplit.mapping import from_mapping
from fedsplit.schemes import LocalWork

from .values import plain

RANKS, ADAPTERS, FFA = "r_by_device", "adapters", "ffa"
WORK = ("batch_size", "steps", "epochs", "device_adapters")
"""Of the group train; the rest says how."""


def local_work(config: DictConfig) -> LocalWork:
    """Return how much a device trains in a turn."""
    train = plain(config.train)
    chosen = {name: train[name] for name in WORK if name in train}
    work = from_mapping(LocalWork, chosen, "train")
    return replace(work, ranks=ranks_by_device(config), averaged=aggregation(config))


def ranks_by_device(config: DictConfig) -> dict[int, int]:
    """Return ``model.r_by_device`` by device: a list of all, or a mapping of some.

    Raises
    ------
    SettingsError
        If it does not fit the fleet or the model's rank, or the model's adapters have no ranks.
    """
    given, most, count = plain(config.model).get(RANKS), config.model.r, config.fleet.devices
    if given is None:
        return {}
    where = f"model.{RANKS}"
    pairs = dict(enumerate(given)) if isinstance(given, list) else given
    whole = not isinstance(given, list) or len(given) == count
    mapped = isinstance(pairs, Mapping) and whole
    require(mapped, where, given, f"{count} ranks, one a device, or a mapping of devices to ranks")
    found = {}
    for device, rank in pairs.items():
        known = str(device).isdecimal() and int(device) < count
        require(known, where, given, f"of devices 0 to {count - 1}")
        right = type(rank) is int and 1 <= rank <= most
        require(right, f"{where}.{device}", rank, f"a whole number from 1 to model.r={most}")
        found[int(device)] = rank
    init = config.model.lora.get("init_lora_weights", True)
    plain_start = init in (True, "gaussian") and config.model.adapter is None
    for name, value, fits in (
        ("train", config.model.train, config.model.train == "lora"),
        ("adapter", config.model.adapter, config.model.adapter is None),
        ("lora.init_lora_weights", init, plain_start),
    ):
        require(fits, f"model.{name}", value, f"as by default with {where}: parts begin as a whole")
    require(not config.run.edge_nodes, "run.edge_nodes", True, f"false with {where}")
    return {device: rank for device, rank in found.items() if rank < most}


def aggregation(config: DictConfig) -> str:
    """Return how adapters become one: ``aggregator.adapters``, by default as ranks need it.

    Raises
    ------
    SettingsError
        If there is no such way.
    """
    from fedsplit.execution.aggregate import AGGREGATIONS, MEAN, RAFLORA

    given = config.aggregator.get(ADAPTERS)
    if given is None:
        return RAFLORA if ranks_by_device(config) else MEAN
    require_choice(f"aggregator.{ADAPTERS}", given, AGGREGATIONS)
    train, lora = config.model.train, plain(config.model).get("lora") or {}
    require_room(given, train=train, lora=lora, edge_nodes=config.run.edge_nodes)
    return str(given)
