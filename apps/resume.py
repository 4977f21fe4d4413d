"""Going on with a run: what may change in its configuration, and what a folder holds already."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from fedsplit.errors import FedsplitError, SettingsError, require

from .config import absolute, change_values, chosen, load_config
from .overrides import Override
from .values import plain

MAY_CHANGE = (
    "aggregator", "evaluate", "keep", "link", "privacy.budget", "rounds", "run", "stop", "tracker",
    "train",
)  # fmt: skip
"""Settings that a run may go on with in another way: how long, how fast, and where."""
_MUST_STAY = ("aggregator._target_",)
CONFIG, RESULTS = "config.yaml", "results.json"


def resumed(folder: Path, changes: Sequence[Override]) -> DictConfig:
    """Return the configuration with which the run in `folder` goes on.

    Parameters
    ----------
    folder : Path
        Where an earlier run wrote.
    changes : sequence of Override
        Settings that are to change.

    Raises
    ------
    FedsplitError
        If `folder` holds no run, or a change is unknown or to something that must stay as it was.
    """
    saved = read_config(folder)
    default = plain(chosen([]))
    unknown = sorted(set(saved) - set(default) - {"paper"})
    require(not unknown, f"{folder / CONFIG}", unknown, "the configuration of a run")
    # Runs saved by an earlier version lack what came later.
    before = {
        key: {**value, **saved[key]}
        if key in MAY_CHANGE and isinstance(value, dict) and isinstance(saved.get(key), dict)
        else saved.get(key, value)
        for key, value in default.items()
    } | {key: saved[key] for key in saved if key == "paper"}
    config = OmegaConf.create(before)
    for change in changes:
        if change.is_choice:
            OmegaConf.update(config, change.key, chosen([change])[change.key], merge=False)
    change_values(config, [item for item in changes if not item.is_choice and item.key != "output"])
    _require_unchanged(before, plain(config))
    for change in changes:
        same = change.key != "output" or change.value in (None, str(folder))
        require(
            same, "output", change.value, f"absent with resume={str(folder)!r}, where it goes on"
        )
    config.resume = str(folder)
    config.output = None
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration that the run in `folder` was started with.

    Raises
    ------
    FedsplitError
        If there is none, or it cannot be read.
    """
    file = folder / CONFIG
    allowed = f"the output folder of a run, with {CONFIG}"
    require(file.is_file(), "resume", str(folder), allowed)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise FedsplitError(f"{file}: is not the configuration of a run ({error})") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise FedsplitError(f"{file}: is not the configuration of a run (no mapping of settings)")
    return values


def _require_unchanged(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    old, new = dict(_leaves(before)), dict(_leaves(after))
    for key in dict.fromkeys((*new, *old)):
        named = key in MAY_CHANGE or key.split(".")[0] in MAY_CHANGE
        may_change = named and key not in _MUST_STAY
        if not may_change and new.get(key) != old.get(key):
            allowed = (
                f"{old.get(key)!r} as in the run that goes on; start another for anything else"
            )
            raise SettingsError(key, new.get(key), allowed)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        elif prefix or name not in ("output", "resume"):
            yield f"{prefix}{name}", value


def is_done(overrides: Sequence[str], config: DictConfig, folder: Path) -> bool:
    """Return whether `folder` holds the run that `overrides` describe, to its end.

    Raises
    ------
    FedsplitError
        If it holds another run.
    """
    from fedsplit.report import is_finished

    if not (folder / RESULTS).exists():
        return False
    if read_config(folder) != plain(load_config(absolute(overrides, config))):
        raise FedsplitError(
            f"output={str(folder)!r}: holds another run; use resume= or another folder"
        )
    return is_finished(folder)


def cut_short(
    overrides: Sequence[str], config: DictConfig, folder: Path
) -> tuple[Sequence[str], DictConfig]:
    """Return what goes on with the run in `folder`, if it is this one and did not come to its end.

    It goes on after its last checkpoint, or begins anew if it did not reach one. Without a run in
    `folder`, or with ``resume=``, what is given is returned.

    Raises
    ------
    FedsplitError
        If `folder` holds another run, or this one is complete.
    """
    from fedsplit.flower.server.checkpoint import holds_checkpoint

    if config.resume is not None or not (folder / RESULTS).exists():
        return overrides, config
    if is_done(overrides, config, folder):
        raise FedsplitError(f"output={str(folder)!r}: holds this run already, to its end")
    if holds_checkpoint(folder):
        resumed = [f"resume={folder}"]
        return resumed, load_config(resumed)
    (folder / RESULTS).unlink()
    return overrides, config
