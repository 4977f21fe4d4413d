"""What a Flower strategy tells its clients, and who obeys it here.

A strategy talks through the ConfigRecord of its messages. Whoever ignores that ignores the
strategy, so what nobody obeys is refused.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    MultiKrum,
    Strategy,
)

from fedsplit.errors import SettingsError, require
from fedsplit.execution.aggregate import FFA, FLEXLORA, MEAN, PADDED, RAFLORA
from fedsplit.growth import LEAVE_RESIDUALS
from fedsplit.schemes.turnout import CARRY, DROP, Waiting

ROUND, PROXIMAL, CLIPPING = "server-round", "proximal-mu", "clipping_norm"
OBEYED = (ROUND, PROXIMAL, CLIPPING)
_UNWEIGHTED = (FedMedian, FedTrimmedAvg, MultiKrum, Bulyan)


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """What a strategy asks of a round.

    Parameters
    ----------
    proximal_mu : float
        Weight of FedProx's term, on every tier; 0 for none.
    clips : bool
        Whether the update of each branch is clipped, as Flower's client-side mods do.
    """

    proximal_mu: float = 0.0
    clips: bool = False


def read_instructions(messages: Iterable[Message]) -> Instructions:
    """Return what the messages of a round say beside the adapters.

    Raises
    ------
    SettingsError
        If they say what nobody obeys, or not the same to all devices.
    """
    told: dict[str, Any] = {}
    for message in messages:
        for record in message.content.config_records.values():
            for key, value in record.items():
                name = f"aggregator tells devices {key}"
                require(key in OBEYED, name, value, f"one of {', '.join(OBEYED)}, which are obeyed")
                before = told.setdefault(key, value)
                require(before == value, name, value, f"the same for all devices, as {before!r}")
    mu = told.get(PROXIMAL, 0.0)
    valid = isinstance(mu, int | float) and 0 <= mu < math.inf
    require(valid, PROXIMAL, mu, "a finite number of at least 0")
    return Instructions(proximal_mu=float(mu), clips=CLIPPING in told)


def require_takes_one(strategy: Strategy, adapters: str) -> None:
    """Refuse a strategy that needs the adapters of each branch, where it gets one aggregate.

    Those that remember what adapters were, element by element, cannot go on with ones whose
    components are found anew each round.

    Raises
    ------
    SettingsError
        Naming it.
    """
    if adapters == MEAN:
        return
    rules: list[object] = [FedAvg.aggregate_train]
    if adapters in (PADDED, FFA):
        kinds = (FedAvgM, FedAdam, FedAdagrad, FedYogi)
        rules += [kind.aggregate_train for kind in kinds]
    name = type(strategy).__name__
    takes = type(strategy).aggregate_train in rules
    allowed = f"{MEAN} with {name}, which wants the adapters of each branch or remembers them"
    require(takes, "aggregator.adapters", adapters, allowed)


def require_takes_late(strategy: Strategy, waiting: Waiting, adapters: str) -> None:
    """Refuse a strategy that would not count late updates less, or would wait for their devices.

    Nor do changes of earlier adapters fit ones whose components are found anew each round.

    Raises
    ------
    SettingsError
        Naming it.
    """
    if waiting.late != CARRY:
        return
    kinds = {type(part).aggregate_train: type(part).__name__ for part in parts_of(strategy)}
    anew = [adapters] if adapters in (RAFLORA, FLEXLORA, *LEAVE_RESIDUALS) else []
    flat = [kinds[rule] for kind in _UNWEIGHTED if (rule := kind.aggregate_train) in kinds]
    allowed = f"{DROP} with %s, which %s"
    for names, why in (
        (flat, "does not weigh what it is sent"),
        (anew, "finds components anew each round"),
    ):
        require(not names, "run.late", CARRY, allowed % (", ".join(names), why))
    enough, needed = waiting.quorum_devices or 0, devices_needed(strategy)
    allowed = f"at most run.quorum_devices={enough} with run.late={CARRY}: others may be under way"
    require(needed <= enough, "aggregator.min_available_nodes", needed, allowed)


def parts_of(strategy: Strategy) -> Iterator[Strategy]:
    """Yield a strategy and those that it wraps."""
    yield strategy
    for value in vars(strategy).values():
        if isinstance(value, Strategy):
            yield from parts_of(value)


def devices_needed(strategy: Strategy) -> int:
    """Return for how many devices Flower's sampling waits before it begins a round."""
    names = ("min_available_nodes", "min_train_nodes")
    return max(getattr(part, name, 0) for part in parts_of(strategy) for name in names)


def clipped(message: Message, reply: Message, inner: Strategy) -> Message:
    """Return a branch's complete `reply` with its update clipped by Flower's own mod.

    The norm is that of the whole adapter set, device and servers together, so it is taken where
    the set is complete: at the server, before anything is aggregated.

    Raises
    ------
    SettingsError
        If Flower's mod refuses the reply.
    """
    adaptive = isinstance(inner, DifferentialPrivacyClientSideAdaptiveClipping)
    mod = adaptiveclipping_mod if adaptive else fixedclipping_mod
    nowhere = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
    result = mod(message, nowhere, lambda *_: reply)
    if result.has_error():
        raise SettingsError("aggregator", type(inner).__name__, f"one that clips ({result.error})")
    return result
