"""From Hydra's configuration to the library's own dataclasses."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedsplit.assets import default_checkpoint
from fedsplit.data import DataSpec
from fedsplit.errors import FedsplitError, require
from fedsplit.execution import OptimizerSpec
from fedsplit.flower import Job, LinkSettings, LocalWork, strategy_names
from fedsplit.mapping import from_mapping
from fedsplit.models import ModelSpec
from fedsplit.plan import CodecPlan

_PACKAGED = "package:default"
_CHOICE = re.compile(r"(model|strategy)=(.+)", re.DOTALL)
# `data=text path=notes.txt` reads better than `data.path`, and nothing else is called so.
_SHORT = re.compile(r"(path|name)=")


@dataclass(frozen=True)
class RunSettings:
    """How a run is carried out on this machine, and how long it goes on.

    Parameters
    ----------
    rounds, evaluate_every : int
        Rounds in all, and between evaluations.
    concurrency : int
        Devices that run at once in a simulation.
    threads, server_threads : int
        Torch threads of a device and of the server.
    edge_nodes : bool
        Whether edge servers are Flower nodes of their own, not hosted by the server's process.
    accelerator : str
        ``auto``, ``cpu`` or a torch device.
    connect_s, deadline_s : float
        How long to wait for all devices, and for the answer of a turn once its device began.
    start_s : float or None
        How long a node may take to begin its task, and its answer to come once its process ended;
        None: `deadline_s`.
    quorum : int
        Branches of a round that must survive, or the run stops.
    start_ahead : bool or None
        Whether the next device of a branch gets ready while the present one trains; None: between
        machines only, as it takes a place in a simulation.
    engine : str
        What simulates the devices: ``embedded``, or Flower's own simulation on Ray, ``flower``.
    """

    rounds: int
    evaluate_every: int
    concurrency: int
    threads: int
    server_threads: int
    edge_nodes: bool
    accelerator: str
    connect_s: float
    deadline_s: float
    start_s: float | None = None
    quorum: int = 1
    start_ahead: bool | None = None
    engine: str = "embedded"

    def __post_init__(self) -> None:
        counts = ("rounds", "evaluate_every", "concurrency", "threads", "server_threads", "quorum")
        for name in counts:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("connect_s", "deadline_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        started = self.start_s is None or self.start_s > 0
        require(started, "start_s", self.start_s, "null or above 0")


def config_dir() -> Path:
    """Return the folder of the configuration: in the wheel beside this file, else at the root."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "conf", here.parent / "conf") if path.is_dir())


def load_config(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration with Hydra.

    ``model=NAME_OR_PATH`` names any checkpoint, and ``strategy=NAME`` any installed scheme, beside
    those that have a file in conf/; ``path=`` and ``name=`` stand for ``data.path`` and
    ``data.name``. With ``resume=FOLDER`` the configuration is the one that the
    run in FOLDER was started with, and further overrides change values in it.

    Parameters
    ----------
    overrides : sequence of str
        Hydra overrides.

    Raises
    ------
    FedsplitError
        If an override is wrong, or names an unknown scheme.
    """
    resume = next((item.split("=", 1)[1] for item in overrides if item.startswith("resume=")), "")
    if resume not in ("", "null"):
        return _resumed(Path(resume), [o for o in overrides if not o.startswith("resume=")])
    directory = config_dir()
    chosen = [item for override in overrides for item in _expand(override, directory)]
    # Hydra keeps its state globally; whoever composed before must not be in the way.
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(directory), version_base="1.3"):
            config = compose("config", chosen)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise FedsplitError(f"configuration: {error}") from error
    return config


def _expand(override: str, directory: Path) -> list[str]:
    override = _SHORT.sub(r"data.\1=", override, count=1) if _SHORT.match(override) else override
    match = _CHOICE.fullmatch(override)
    if match is None:
        return [override]
    group, value = match[1], match[2].strip("'\"")
    known = {path.stem for path in (directory / group).glob("*.yaml")}
    if value in known:
        return [override]
    if group == "model":
        return ["model=checkpoint", f"model.source='{value}'"]
    names = strategy_names()
    require(value in names, "strategy", value, f"one of {', '.join(names)}")
    return ["~strategy", f"+strategy.name={value}"]


def _resumed(folder: Path, overrides: list[str]) -> DictConfig:
    file = folder / "config.yaml"
    require(file.is_file(), "resume", str(folder), "the output folder of a run (with config.yaml)")
    config = OmegaConf.load(file)
    try:
        config.merge_with_dotlist(overrides)
    except (OmegaConfBaseException, ValueError) as error:
        raise FedsplitError(f"configuration: {error}") from error
    config.resume = config.output = str(folder.resolve())
    assert isinstance(config, DictConfig)
    return config


def output_folder(config: DictConfig, default: str = "") -> Path:
    """Return where the run writes: as configured, else `default`, else by the time of day."""
    folder = config.output or default or time.strftime("outputs/%Y-%m-%d_%H-%M-%S")
    return Path(folder).resolve()


def plain(config: Any) -> dict[str, Any]:
    """Return a part of the configuration as plain Python values."""
    value = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if not isinstance(value, dict):
        raise FedsplitError(f"configuration: {config!r} must be a mapping")
    return {str(key): item for key, item in value.items()}


def model_spec(config: DictConfig) -> ModelSpec:
    """Return the ``model`` group as a `ModelSpec`, with the folder of the shipped checkpoint."""
    values = plain(config.model)
    if values.get("source") == _PACKAGED:
        values["source"] = str(default_checkpoint())
    return from_mapping(ModelSpec, values, "model")


def job(config: DictConfig, source: str = "") -> Job:
    """Return what every node of the run has to know."""
    link = link_settings(config)
    return Job(
        model=model_spec(config),
        data=from_mapping(DataSpec, plain(config.data), "data"),
        optimizer=from_mapping(OptimizerSpec, plain(config.train.optimizer), "train.optimizer"),
        n_devices=config.fleet.devices,
        batch_size=config.train.batch_size,
        seed=config.seed,
        threads=config.run.threads,
        accelerator=config.run.accelerator,
        source=source,
        connect_s=config.run.connect_s,
        security=link.security,
        ping_s=link.ping_s,
    )


def run_settings(config: DictConfig) -> RunSettings:
    """Return how the run is carried out."""
    values = {"rounds": config.rounds, "evaluate_every": config.evaluate.every, **plain(config.run)}
    return from_mapping(RunSettings, values, "run")


def link_settings(config: DictConfig) -> LinkSettings:
    """Return the ``link`` group: how devices and edges reach the server.

    Runs saved before there was one have none.
    """
    settings = from_mapping(LinkSettings, plain(config.get("link", {})), "link")
    if settings.bind is None and settings.certificate is not None:
        raise FedsplitError("link.bind=None: must be given with link.certificate")
    return settings


def local_work(config: DictConfig) -> LocalWork:
    """Return how much a device trains in a turn."""
    train = plain(config.train)
    train.pop("optimizer")
    return from_mapping(LocalWork, train, "train")


def codec_plan(config: DictConfig) -> CodecPlan:
    """Return the ``codec`` group: settings of the way up and the way down."""
    return from_mapping(CodecPlan, plain(config.codec), "codec")
