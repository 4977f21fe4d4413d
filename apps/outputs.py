"""What a run leaves behind, as configured: what is measured, kept and told, and when it ends."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from omegaconf import DictConfig, OmegaConf

from fedsplit.errors import SettingsError, require, require_choice
from fedsplit.mapping import from_mapping

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)
else:
    T = TypeVar("T")

METRICS = ("perplexity", "token_accuracy")
JUDGES = ("eval_loss", "central_loss")
TRACKERS = ("mlflow", "wandb")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What is measured after a round.

    Parameters
    ----------
    max_samples : int or None
        Test samples of a device, and of the central set, at most; drawn once for the run.
    central : str or None
        File or folder of a test set of the server's own.
    metrics : tuple of str
        What is reported of a language model beside its loss.
    prompts : tuple of str
        Texts that the model goes on from, into the results.
    prompts_every : int
        Rounds between that.
    max_new_tokens : int
        Tokens that it writes at most.
    best_by : str
        What the best round is judged by: "eval_loss" (devices) or "central_loss".
    """

    max_samples: int | None = None
    central: str | None = None
    metrics: tuple[str, ...] = ("perplexity",)
    prompts: tuple[str, ...] = ()
    prompts_every: int = 1
    max_new_tokens: int = 64
    best_by: str = "eval_loss"

    def __post_init__(self) -> None:
        most = self.max_samples
        require(most is None or most >= 1, "max_samples", most, "at least 1, or null for all")
        for name in self.metrics:
            require_choice("metrics", name, METRICS)
        require("" not in self.prompts, "prompts", list(self.prompts), "texts that are not empty")
        require(self.prompts_every >= 1, "prompts_every", self.prompts_every, "at least 1")
        tokens = self.max_new_tokens
        require(1 <= tokens <= 1 << 16, "max_new_tokens", tokens, "from 1 to 65536")
        require_choice("best_by", self.best_by, JUDGES)
        judged = self.best_by != "central_loss" or self.central is not None
        require(judged, "best_by", self.best_by, "eval_loss without evaluate.central")


@dataclass(frozen=True, kw_only=True)
class KeepSettings:
    """Which adapters are kept beside the last: of `every` so many rounds, and the `best`."""

    every: int | None = None
    best: bool = False

    def __post_init__(self) -> None:
        every = self.every
        require(every is None or every >= 1, "every", every, "at least 1, or null for none")


@dataclass(frozen=True, kw_only=True)
class StopSettings:
    """When a run ends early: `patience` rounds without a loss that is lower by `min_delta` nats."""

    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        rounds = self.patience
        require(rounds is None or rounds >= 1, "patience", rounds, "at least 1, or null for never")
        least = self.min_delta
        require(0 <= least < float("inf"), "min_delta", least, "at least 0 and finite")


def make_folder(folder: Path) -> Path:
    """Make `folder`, if there is none, and return it.

    Raises
    ------
    FedsplitError
        If it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise SettingsError("output", str(folder), f"a folder; {error.strerror}") from error
    require(writable, "output", str(folder), "a folder that can be written to")
    return folder


def evaluate_settings(config: DictConfig) -> EvaluateSettings:
    """Return the ``evaluate`` group, without how often, which is `RunSettings`'."""
    return _group(EvaluateSettings, config, "evaluate", ("every",))


def keep_settings(config: DictConfig) -> KeepSettings:
    """Return the ``keep`` group."""
    return _group(KeepSettings, config, "keep")


def stop_settings(config: DictConfig) -> StopSettings:
    """Return the ``stop`` group."""
    return _group(StopSettings, config, "stop")


def tracker(config: DictConfig, installed: Callable[[str], object] = find_spec) -> str | None:
    """Return who else is told, ``tracker``.

    Raises
    ------
    SettingsError
        If nobody is called so, or its package is not installed.
    """
    name = config.tracker
    if name is None:
        return None
    require_choice("tracker", name, TRACKERS)
    if installed(name) is None:
        raise SettingsError("tracker", name, f"installed: pip install 'fedsplit[{name}]'")
    return str(name)


def _group(cls: type[T], config: DictConfig, name: str, others: tuple[str, ...] = ()) -> T:
    values = OmegaConf.to_container(config[name], resolve=True)
    assert isinstance(values, dict)
    given = {str(key): value for key, value in values.items() if key not in others}
    return from_mapping(cls, given, name)
