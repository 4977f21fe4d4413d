"""A run's state after each round, from which it can go on."""

import inspect
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import Tensor

from fedsplit.errors import FedsplitError, require
from fedsplit.flower.server.outcome import WEIGHT
from fedsplit.flower.server.standing import Carried, Contribution, Standing
from fedsplit.mapping import convert, from_mapping, to_mapping
from fedsplit.schemes.turnout import UnderWay

_ADAPTERS, _STRATEGY, _STATE = "adapters.safetensors", "strategy.safetensors", "state.json"
_FOLDER = "checkpoint"
_PLACES = (_FOLDER, f"{_FOLDER}.old")


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on after `server_round`.

    Parameters
    ----------
    server_round : int
        The last round that was completed.
    adapters : dict of str to Tensor
        The global adapters after it.
    strategy : dict of str to array
        The wrapped strategy's own state (moments of FedAdam and the like).
    spent_j : tuple of float
        Modelled energy of each device so far; empty if it was not kept.
    standing : Standing
        What is still to come of rounds before, and who takes part no more.
    """

    server_round: int
    adapters: dict[str, Tensor]
    strategy: dict[str, NDArray[Any]]
    spent_j: tuple[float, ...] = ()
    standing: Standing = field(default_factory=Standing)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` under `folder` in place of the one before.

    A kill or a full disk at any point leaves one of the two whole.

    Raises
    ------
    FedsplitError
        If it cannot be written.
    """
    target, fresh, old = folder / _FOLDER, folder / f"{_FOLDER}.new", folder / f"{_FOLDER}.old"
    try:
        _write(fresh, checkpoint)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        fresh.rename(target)
    except (OSError, SafetensorError) as error:
        raise FedsplitError(f"{fresh}: checkpoint cannot be written ({error})") from error
    shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_tensors({n: t.contiguous() for n, t in checkpoint.adapters.items()}, folder / _ADAPTERS)
    save_file(checkpoint.strategy, folder / _STRATEGY)
    standing = checkpoint.standing
    late = []
    for number, one in enumerate(standing.carried):
        changes = {name: tensor.contiguous() for name, tensor in one.brings.adapters.items()}
        save_tensors(changes, folder / _late(number))
        told = {"metrics": dict(one.brings.metrics), "rank": one.brings.rank}
        late.append({"turn": to_mapping(one.turn), **told})
    state = {
        "server_round": checkpoint.server_round,
        "spent_j": checkpoint.spent_j,
        "late": late,
        "exhausted": standing.exhausted,
    }
    (folder / _STATE).write_text(json.dumps(state))
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def holds_checkpoint(folder: Path) -> bool:
    """Return whether a round was completed in `folder`."""
    return any((folder / name).is_dir() for name in _PLACES)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the last whole checkpoint under `folder`.

    Raises
    ------
    FedsplitError
        If there is none, or it cannot be read.
    """
    for name in _PLACES:
        place = folder / name
        if place.is_dir():
            try:
                state = json.loads((place / _STATE).read_text())
                return Checkpoint(
                    int(state["server_round"]),
                    load_tensors(place / _ADAPTERS),
                    load_file(place / _STRATEGY),
                    tuple(float(joules) for joules in state.get("spent_j", ())),
                    _standing(place, state),
                )
            except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
                raise FedsplitError(f"{place}: is not a checkpoint of a run ({error})") from error
    raise FedsplitError(
        f"resume={str(folder)!r}: holds no checkpoint; no round was completed there"
    )


def _standing(folder: Path, state: Mapping[str, Any]) -> Standing:
    """Read what was still to come; runs of before have nothing of it."""
    carried = []
    for number, kept in enumerate(state.get("late", ())):
        turn = from_mapping(UnderWay, kept["turn"], "late.turn")
        brings = Contribution(
            devices=turn.devices,
            adapters=load_tensors(folder / _late(number)),
            metrics=convert(Mapping[str, float], kept["metrics"], "late.metrics"),
            rank=convert(int | None, kept["rank"], "late.rank"),
        )
        require(brings.metrics[WEIGHT] > 0, "late.metrics", brings.metrics, "a weight above 0")
        carried.append(Carried(turn=turn, brings=brings))
    exhausted = convert(tuple[int, ...], state.get("exhausted", ()), "exhausted")
    return Standing(carried=tuple(carried), exhausted=exhausted)


def _late(number: int) -> str:
    return f"late_{number}.safetensors"


def strategy_state(strategy: Strategy) -> dict[str, NDArray[Any]]:
    """Return the arrays that a Flower strategy keeps from round to round, wrapped ones included.

    Flower's strategies hold them as attributes: dictionaries of arrays (the moments of FedAdam),
    arrays, or numbers (adaptive clipping norms).
    """
    state: dict[str, NDArray[Any]] = {}
    for attribute, value in vars(strategy).items():
        if isinstance(value, Strategy):
            nested = strategy_state(value)
            state |= {f"{attribute}/{name}": array for name, array in nested.items()}
        elif _is_array_dict(value):
            state |= {f"{attribute}:{name}": array for name, array in value.items()}
        elif isinstance(value, np.ndarray):
            state[attribute] = value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            state[attribute] = np.asarray(value, dtype=np.float64)
    return state


def restore_strategy(strategy: Strategy, state: dict[str, NDArray[Any]]) -> None:
    """Put back what `strategy_state` returned, but settings, which stay as `strategy` was made.

    A checkpoint is a file that others may have written: it sets nothing but arrays and numbers
    that a strategy of this kind keeps itself.

    Raises
    ------
    FedsplitError
        If `state` holds what is no state of `strategy`; it may be changed in part then.
    """
    for name, array in state.items():
        attribute, colon, key = name.partition(":")
        *path, last = attribute.split("/")
        owner: object = strategy
        for step in path:
            owner = vars(owner).get(step) if isinstance(owner, Strategy) else None
        kept = vars(owner) if isinstance(owner, Strategy) else {}
        held = kept.get(last)
        if last in inspect.signature(type(owner)).parameters:
            continue
        collects = held is None or held == {} or _is_array_dict(held)
        number = isinstance(held, int | float) and not isinstance(held, bool)
        right = collects if colon else number or held is None or isinstance(held, np.ndarray)
        if last not in kept or not right or array.dtype.kind not in "fiu":
            kind = type(strategy).__name__
            raise FedsplitError(f"checkpoint: {name!r:.80} is no state that {kind} keeps")
        if colon:
            kept[last] = {**(held or {}), key: array}
        elif number:
            kept[last] = int(array) if isinstance(held, int) else float(array)
        else:
            kept[last] = array


def _is_array_dict(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(item, np.ndarray) for item in value.values())
    )
