"""The Flower strategy that a configuration names, built without calling anything else."""

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedsplit.errors import FedsplitError, SettingsError, require
from fedsplit.flower.instructions import parts_of
from fedsplit.mapping import call
from fedsplit.plan import RoundPlan

ADAPTERS = "adapters"
_TARGET = "_target_"
_FLOWERS = "flwr.serverapp.strategy"
_DEFAULT = f"{_FLOWERS}.FedAvg"
_WRAPPED = "strategy"


def build_aggregator(settings: Mapping[str, Any], where: str = "aggregator") -> Strategy:
    """Return the Flower strategy that ``_target_`` names, with the other settings as arguments.

    An argument that is a mapping with ``_target_`` is a strategy too. A wrapper, such as those for
    differential privacy, has one as its argument `strategy`, by default FedAvg; settings that it
    does not take itself go there.

    Parameters
    ----------
    settings : mapping
        The ``aggregator`` group.
    where : str
        What they are called, for the error.

    Raises
    ------
    FedsplitError
        If ``_target_`` names no subclass of Flower's `Strategy`, which is then not called; if an
        argument is unknown, of the wrong type or refused by the strategy.
    """
    arguments = dict(settings)
    arguments.pop(ADAPTERS, None)  # how adapters become one is not for the strategy
    kind = find_strategy_class(arguments.pop(_TARGET, None), f"{where}.{_TARGET}")
    parameters = inspect.signature(kind).parameters
    if _WRAPPED in parameters:
        # What a wrapper does not take is for the strategy that it wraps.
        others = {name: arguments.pop(name) for name in set(arguments) - set(parameters)}
        arguments[_WRAPPED] = {_TARGET: _DEFAULT, **others, **arguments.get(_WRAPPED, {})}
    for name, value in arguments.items():
        if isinstance(value, Mapping) and _TARGET in value:
            arguments[name] = build_aggregator(value, f"{where}.{name}")
        elif name.startswith("fraction_"):
            least = "from 0" if name == "fraction_evaluate" else "above 0"
            number = isinstance(value, int | float) and not isinstance(value, bool)
            inside = number and 0 <= value <= 1 and (value > 0 or least == "from 0")
            require(inside, f"{where}.{name}", value, f"a number {least} to 1")
        elif name.startswith(("min_", "num_")) and isinstance(value, int):
            require(value >= 0, f"{where}.{name}", value, "at least 0")
    try:
        return call(kind, arguments, where)
    except FedsplitError:
        raise
    except Exception as error:  # What a strategy's own checks raise is theirs to choose.
        raise FedsplitError(f"{where}: {kind.__name__} refuses its settings ({error})") from error


def find_strategy_class(target: object, field: str) -> type[Strategy]:
    """Return the class that the dotted name `target` stands for.

    Raises
    ------
    FedsplitError
        If it cannot be imported, or is no subclass of Flower's `Strategy`; names `field`.
    """
    allowed = "the dotted name of a Flower strategy's class, such as"
    example = _DEFAULT
    require(isinstance(target, str) and "." in target, field, target, f"{allowed} {example}")
    secure = "secagg" in str(target).lower()
    apart = "a strategy; secure aggregation hides updates of which a server itself trains a part"
    require(not secure, field, target, apart)
    module_name, _, name = str(target).rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # Importing runs code of others, which may raise anything.
        raise SettingsError(field, target, f"{allowed} {example} ({error})") from error
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, Strategy) and found is not Strategy:
        return found
    here = [
        key
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Strategy) and value is not Strategy
    ]
    near = difflib.get_close_matches(name, here, n=1)
    example = f"{module_name}.{near[0]}" if near else example
    raise SettingsError(field, target, f"{allowed} {example}")


def require_enough_devices(strategy: Strategy, n_devices: int) -> None:
    """Refuse a strategy that would wait for more devices than there will ever be.

    Raises
    ------
    FedsplitError
        Naming the setting.
    """
    for part in parts_of(strategy):
        for name in ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes"):
            least = getattr(part, name, 0)
            allowed = f"at most fleet.devices={n_devices}, or the run would wait for ever"
            require(least <= n_devices, f"aggregator.{name}", least, allowed)


def require_enough_updates(strategy: Strategy, plan: RoundPlan) -> None:
    """Refuse differential privacy whose noise is for the mean of more updates than a round has.

    Each branch of `plan` gives one update, whose norm is bounded, however many devices trained it.

    Raises
    ------
    SettingsError
        Naming the setting.
    """
    count = len(plan.branches)
    for part in parts_of(strategy):
        assumed = getattr(part, "num_sampled_clients", 0)
        allowed = (
            f"at most {count}, the updates of a round of this scheme; the noise is divided by it"
        )
        require(assumed <= count, "aggregator.num_sampled_clients", assumed, allowed)
