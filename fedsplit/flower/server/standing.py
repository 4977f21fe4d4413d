"""What of earlier rounds is still to come, and who takes part no more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message, MetricRecord, RecordDict
from torch import Tensor

from fedsplit.errors import FedsplitError, NodeLost
from fedsplit.execution.aggregate import Part, aggregate
from fedsplit.flower.messages import to_record
from fedsplit.flower.replies import metrics_of
from fedsplit.flower.server.outcome import WEIGHT, BranchOutcome, check_complete
from fedsplit.flower.server.roster import Roster
from fedsplit.flower.server.spool import Spool, Spooled
from fedsplit.schemes import Scheme
from fedsplit.schemes.turnout import Turnout, UnderWay


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What a branch brings to the round that aggregates it.

    Parameters
    ----------
    devices : tuple of int
        Its devices.
    adapters : mapping of str to Tensor
        Its complete set, of the device and of the servers.
    metrics : mapping of str to float
        What its reply says; ``num-examples`` is how much it counts.
    rank : int or None
        How many components it trained; None for all.
    """

    devices: tuple[int, ...]
    adapters: Mapping[str, Tensor]
    metrics: Mapping[str, float]
    rank: int | None = None

    @classmethod
    def of(cls, outcome: BranchOutcome, scheme: Scheme, roster: Roster) -> "Contribution":
        """Return what a branch that survived brings; `scheme` says how much it counts."""
        devices = dict.fromkeys(turn.turn.device for turn in outcome.turns)
        samples = [roster.by_index(device).n_train for device in devices]
        return cls(
            devices=outcome.branch.devices,
            adapters=outcome.adapters,
            metrics=metrics_of(outcome.turns, scheme.branch_weight(samples)),
            rank=outcome.branch.rank,
        )

    @property
    def part(self) -> Part:
        """What `fedsplit.execution.aggregate` takes."""
        return Part(adapters=self.adapters, weight=self.metrics[WEIGHT], rank=self.rank)

    def reply(self, message: Message) -> Message:
        """Return the reply to `message` of a device that had trained all of it."""
        held = self.adapters
        arrays = held.record() if isinstance(held, Spooled) else to_record(held)
        metrics = MetricRecord(dict(self.metrics))
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def merged(how: str, brought: Sequence[Contribution]) -> Contribution:
    """Return one contribution with the aggregate of all, and the means of their metrics."""
    weights = [one.metrics[WEIGHT] for one in brought]
    total = sum(weights)
    names = [name for name in brought[0].metrics if all(name in one.metrics for one in brought)]
    means = {
        name: sum(w * one.metrics[name] for w, one in zip(weights, brought, strict=True)) / total
        for name in names
    }
    return Contribution(
        devices=brought[0].devices,
        adapters=aggregate(how, [one.part for one in brought]),
        metrics={**means, WEIGHT: total},
    )


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a branch brings that is under way; its `adapters` are the changes that it made."""

    turn: UnderWay
    brings: Contribution

    @classmethod
    def of(cls, turn: UnderWay, brings: Contribution, base: Mapping[str, Tensor]) -> "Carried":
        """Return what a branch brings that began with the adapters `base`."""
        changes = {name: trained - base[name] for name, trained in brings.adapters.items()}
        return cls(turn=turn, brings=replace(brings, adapters=Spool().put(changes)))

    def arrive(self, base: Mapping[str, Tensor], weight: float) -> Contribution:
        """Return the same changes made to the adapters `base`, and counted `weight` times."""
        changes, metrics = self.brings.adapters, self.brings.metrics
        try:
            check_complete(changes, base)
        except NodeLost as error:
            raise FedsplitError(f"what device {self.turn.devices[0]} brings: {error}") from error
        moved = {name: base[name] + changes[name] for name in base}
        counted = {**metrics, WEIGHT: weight * metrics[WEIGHT]}
        return replace(self.brings, adapters=Spool().put(moved), metrics=counted)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a round leaves to the next, beside the adapters.

    Parameters
    ----------
    carried : tuple of Carried
        What is still to come.
    exhausted : tuple of int
        Devices whose energy is spent.
    """

    carried: tuple[Carried, ...] = ()
    exhausted: tuple[int, ...] = ()

    @property
    def under_way(self) -> tuple[UnderWay, ...]:
        """Who is still to come."""
        return tuple(one.turn for one in self.carried)

    @property
    def absent(self) -> frozenset[int]:
        """Devices that cannot begin a turn."""
        busy = (device for one in self.under_way for device in one.devices)
        return frozenset((*busy, *self.exhausted))

    def arrived(self, turnout: Turnout, base: Mapping[str, Tensor]) -> list[Contribution]:
        """Return what comes in a round whose adapters are `base`."""
        held = {one.turn.devices: one for one in self.carried}
        return [
            held[turn.devices].arrive(base, weight)
            for turn, weight in zip(turnout.arriving, turnout.weights, strict=True)
        ]

    def after(
        self, turnout: Turnout, brought: Sequence[Contribution], base: Mapping[str, Tensor]
    ) -> "Standing":
        """Return what is left after a round that began with `base` and whose branches `brought`.

        A late branch that failed is not among them, and brings nothing.
        """
        held = {one.turn.devices: one for one in self.carried}
        fresh = {one.devices: one for one in brought}
        carried = [
            replace(held[turn.devices], turn=turn)
            if turn.devices in held
            else Carried.of(turn, fresh[turn.devices], base)
            for turn in turnout.under_way
            if turn.devices in held or turn.devices in fresh
        ]
        return Standing(carried=tuple(carried), exhausted=(*self.exhausted, *turnout.exhausted))
