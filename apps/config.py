"""From Hydra's configuration to the library's own dataclasses.

What needs torch, transformers or Flower is imported where it is used: a wrong setting is refused,
and the configuration shown, before any of them is loaded.
"""

import json
import os
import time
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsplit.errors import FedsplitError, SettingsError, require
from fedsplit.fleet import FleetSpec
from fedsplit.fleet.boards import read_boards
from fedsplit.mapping import convert, from_mapping

from .known import require_known
from .link_config import link_settings, patience, server_limits
from .outputs import evaluate_settings, keep_settings, stop_settings, tracker
from .overrides import (
    OPEN,
    PATHS,
    PATHS_OR_NAMES,
    Override,
    absolute_path,
    config_dir,
    groups,
    parse,
)
from .run_settings import run_settings
from .values import plain, without
from .work import ADAPTERS, FFA, RANKS, WORK, local_work

if TYPE_CHECKING:
    from fedsplit.data import DataSpec
    from fedsplit.execution import OptimizerSpec
    from fedsplit.flower import Job
    from fedsplit.models import ModelSpec
    from fedsplit.plan import CodecPlan

_PACKAGED = "package:default"
_FILES = ("data", "csv", "server_profile")  # settings of fleet that the fleet itself is not made of
_MAX_SEED = 2**63 - 1


def load_config(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration with Hydra.

    ``model=NAME_OR_PATH`` names any checkpoint, and ``strategy=NAME`` any installed scheme, beside
    those that have a file in conf/; ``path=`` and ``name=`` stand for ``data.path`` and
    ``data.name``. Paths are taken as they are written, and are absolute in what is returned. With
    ``resume=FOLDER`` the configuration is the one that the run in FOLDER was started with, and
    further overrides change what may change in it (`apps.resume`).

    Parameters
    ----------
    overrides : sequence of str
        As KEY=VALUE, in Hydra's notation.

    Raises
    ------
    FedsplitError
        If an override is wrong or unknown, or what must be given is not.
    """
    changes = parse(overrides)
    folder = next((change.value for change in changes if change.key == "resume"), None)
    try:
        if folder is not None:
            from .resume import resumed

            return resumed(Path(folder), [item for item in changes if item.key != "resume"])
        config = chosen(changes)
        change_values(config, changes)
    except (HydraException, OmegaConfBaseException, RecursionError) as error:
        key = getattr(error, "full_key", None) or "configuration"
        raise FedsplitError(f"{key}: {str(error).partition(chr(10))[0]}") from error
    return config


def chosen(changes: Sequence[Override]) -> DictConfig:
    """Return the configuration of the files that `changes` choose."""
    choices = {change.key: str(change.value) for change in changes if change.is_choice}
    scheme = choices.get("strategy", "")
    if scheme and scheme not in groups()["strategy"]:
        choices.pop("strategy")
    else:
        scheme = ""
    words = [f"{'+' * (group == 'paper')}{group}={name}" for group, name in choices.items()]
    config = deepcopy(_composed((*words, *["~strategy"] * bool(scheme))))
    if scheme:
        OmegaConf.update(config, "strategy", {"name": scheme}, force_add=True)
    return config


@cache
def _composed(words: tuple[str, ...]) -> DictConfig:
    """Compose the files once, which takes 0.1 s, however many values a study changes in them."""
    # Hydra keeps its state globally; whoever composed before must not be in the way.
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", list(words))


def change_values(config: DictConfig, changes: Sequence[Override]) -> None:
    """Set single values in `config`, each of which must be known there; resolve and complete it.

    Raises
    ------
    FedsplitError
        Naming what is unknown, or missing.
    """
    held = OmegaConf.to_container(config, resolve=False)
    assert isinstance(held, dict)
    known: dict[str, Any] = {str(name): value for name, value in held.items()}
    own_scheme = known.get("strategy", {}).get("name") not in groups()["strategy"]
    opened = (*OPEN, *["strategy"] * own_scheme)
    for change in changes:
        if not change.is_choice:
            require_known(known, change.key, change.value, opened)
            OmegaConf.update(config, change.key, change.value, merge=True, force_add=True)
    local = OmegaConf.select(config, "data.partition") == "local"
    if local and OmegaConf.is_missing(config.data, "path"):
        config.data.path = None  # each device has its own
    missing = sorted(OmegaConf.missing_keys(config))
    require(not missing, missing[0] if missing else "", None, "given")
    OmegaConf.resolve(config)
    for key in (*PATHS, *PATHS_OR_NAMES):
        value = OmegaConf.select(config, key)
        if isinstance(value, str):
            OmegaConf.update(config, key, absolute_path(key, value))


def absolute(overrides: Sequence[str], config: DictConfig) -> list[str]:
    """Return `overrides` so that they say the same in any working folder, without ``output``.

    The server app runs in another folder than the user.
    """
    kept = [item.text for item in parse(overrides) if item.key not in ("output", "resume")]
    if config.resume is not None:
        kept += [item.text for item in parse([f"resume={config.resume}"])]
    return kept


def output_folder(config: DictConfig, default: str = "") -> Path:
    """Return where the run writes: as configured, else `default`, else by the time of day."""
    folder = config.resume or config.output or default or time.strftime("outputs/%Y-%m-%d_%H-%M-%S")
    return Path(os.path.abspath(folder))


def model_spec(config: DictConfig) -> "ModelSpec":
    """Return the ``model`` group as a `ModelSpec`, with the folder of the shipped checkpoint."""
    from fedsplit.assets import default_checkpoint
    from fedsplit.models import Bottleneck, ModelSpec

    from .spending import BOTTLENECK

    values = plain(config.model)
    if values.get("source") == _PACKAGED:
        values["source"] = str(default_checkpoint())
    if values.get("task") == "sequence-classification" and config.data.get("loss_on") == "label":
        # Every node has to know how many there are, before it has seen any.
        values["config"].setdefault("num_labels", _n_labels(json.dumps(plain(config.data))))
    if values.get("adapter") is not None:
        values |= _started_from(values)
    narrow = plain(config.privacy).get(BOTTLENECK)
    if narrow is not None:
        values[BOTTLENECK] = convert(Bottleneck, narrow, f"privacy.{BOTTLENECK}")
    values.pop(RANKS, None)
    values["freeze_a"] = config.aggregator.get(ADAPTERS) == FFA
    low_rank = values.get("train") == "lora" or not values["freeze_a"]
    require(low_rank, f"aggregator.{ADAPTERS}", FFA, "another one with model.train=full")
    return from_mapping(ModelSpec, values, "model")


@cache
def _n_labels(data: str) -> int | None:
    from fedsplit.data import DataSpec
    from fedsplit.data.sources import read_corpus

    spec = from_mapping(DataSpec, json.loads(data), "data")
    return len(spec.labels) if spec.labels is not None else read_corpus(spec).n_labels


def _started_from(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the adapter that the ``model`` group names; others may not differ."""
    from fedsplit.models import ModelSpec, adapter_settings

    try:
        found = adapter_settings(str(values["adapter"]))
    except SettingsError as error:
        raise SettingsError(f"model.{error.field}", error.value, error.allowed) from error
    for name in ("r", "alpha", "dropout", "lora"):
        given, default = values[name], getattr(ModelSpec(model_type="gpt2"), name)
        allowed = f"{found[name]!r}, as model.adapter has it"
        require(given in (default, found[name]), f"model.{name}", given, allowed)
    return found


def data_spec(config: DictConfig) -> "DataSpec":
    """Return the ``data`` group."""
    from fedsplit.data import DataSpec

    return from_mapping(DataSpec, plain(config.data), "data")


def fleet_spec(config: DictConfig) -> FleetSpec:
    """Return the ``fleet`` group, without its files: the devices' data, the server's profile.

    Raises
    ------
    FedsplitError
        If a setting is wrong, or the boards of ``fleet.csv`` are, or nothing uses any of them.
    """
    values, file = without(plain(config.fleet), _FILES), config.fleet.get("csv")
    require(file is not None or values["types"] is not None, "fleet.csv", None, "a CSV of boards")
    if file is not None:
        boards, dealt = read_boards(file)
        types = dealt if values["types"] is None else values["types"]
        values |= {"types": types, "processors": {**boards, **values["processors"]}}
        members = [item.get("type") for item in values["members"]]
        used = boards.keys() & {*types, *members, values["server"], values["edge"]}
        require(bool(used), "fleet.csv", file, "used: fleet.types=null takes all boards of it")
    return from_mapping(FleetSpec, values, "fleet")


def data_paths(config: DictConfig) -> tuple[str, ...] | None:
    """Return the file or folder of each device's own, ``fleet.data``, where there are any.

    Raises
    ------
    FedsplitError
        If there is not one for each device, or no use for them.
    """
    given = config.fleet.get("data")
    if given is None:
        return None
    listed = isinstance(given, ListConfig) and all(isinstance(item, str) for item in given)
    count = n_devices(config)
    fits = listed and len(given) == count
    require(fits, "fleet.data", given, f"null, or {count} paths, one for each of fleet.devices")
    local = config.data.get("partition") == "local"
    require(local, "fleet.data", given, "null without data.partition=local")
    return tuple(str(absolute_path("fleet.data", item)) for item in given)


def job(config: DictConfig, source: str = "") -> "Job":
    """Return what every node of the run has to know."""
    from fedsplit.flower import Job

    from .spending import privacy_spec

    link, evaluation = link_settings(config), evaluate_settings(config)
    try:
        return Job(
            model=model_spec(config),
            data=data_spec(config),
            data_paths=data_paths(config),
            optimizer=optimizer_spec(config),
            n_devices=n_devices(config),
            batch_size=local_work(config).batch_size,
            seed=seed(config),
            threads=config.run.threads,
            accelerator=config.run.accelerator,
            source=source,
            security=link.security,
            patience=patience(config),
            limits=server_limits(config),
            max_eval_samples=evaluation.max_samples,
            token_accuracy="token_accuracy" in evaluation.metrics,
            privacy=privacy_spec(config),
        )
    except SettingsError as error:
        places = {"threads": "run.threads"}
        raise SettingsError(
            places.get(error.field, error.field), error.value, error.allowed
        ) from error


def optimizer_spec(config: DictConfig) -> "OptimizerSpec":
    """Return how turns train: ``train.optimizer``, and what stands beside it in ``train``."""
    from fedsplit.execution import OptimizerSpec

    train = plain(config.train)
    recipe = without(train, ("optimizer", *WORK))
    try:
        return from_mapping(OptimizerSpec, {**train["optimizer"], **recipe}, "train.optimizer")
    except SettingsError as error:
        name = error.field.removeprefix("train.optimizer.")
        field = f"train.{name}" if name in recipe else error.field
        raise SettingsError(field, error.value, error.allowed) from error


def require_plain(config: DictConfig) -> None:
    """Refuse wrong values of all that can be checked without torch and Flower.

    Raises
    ------
    FedsplitError
        Naming the field.
    """
    from fedsplit.wireless import ChannelSpec

    run_settings(config)
    evaluate_settings(config), keep_settings(config), stop_settings(config), tracker(config)
    patience(config)
    seed(config)
    n_devices(config)
    from_mapping(ChannelSpec, plain(config.channel), "channel")
    fleet_spec(config)


def seed(config: DictConfig) -> int:
    """Return the root of every random draw."""
    value = config.seed
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_SEED
    require(whole, "seed", value, f"a whole number from 0 to {_MAX_SEED}")
    return int(value)


def n_devices(config: DictConfig) -> int:
    """Return how many devices take part."""
    value = config.fleet.devices
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(whole, "fleet.devices", value, "a whole number, at least 1")
    return int(value)


def codec_plan(config: DictConfig) -> "CodecPlan":
    """Return the ``codec`` group: settings of the way up and the way down."""
    from fedsplit.plan import CodecPlan

    return from_mapping(CodecPlan, plain(config.codec), "codec")
