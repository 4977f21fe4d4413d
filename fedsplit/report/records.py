"""What is kept of a round."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedsplit.errors import FedsplitError
from fedsplit.mapping import from_mapping
from fedsplit.plan import Failure


@dataclass(frozen=True)
class Written:
    """What the model wrote after a prompt."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Arrival:
    """A device whose turn began in round `since`, and whose update counts `weight` times."""

    device: int
    since: int
    weight: float


@dataclass(frozen=True)
class RoundRecord:
    """The outcome of one round, measured and modelled kept apart.

    Parameters
    ----------
    round : int
        Number of the round; 0 is the evaluation before any training.
    train_loss, eval_loss : float or None
        Mean loss per target (nats); None if nothing was trained or evaluated.
    perplexity : float or None
        ``exp(eval_loss)`` of a language model.
    accuracy : float or None
        Share of test targets predicted right.
    macro_f1 : float or None
        Mean over the classes of texts of their F1 scores.
    bytes_up, bytes_down : mapping of str to int
        Bytes counted on the wire, by the tier that sends upward or receives from above:
        ``{"device": 4096, "edge": 4096}``. What the training exchanges; no adapters.
    adapter_bytes_up, adapter_bytes_down : mapping of str to int
        Adapters that devices exchanged with their edge over the same wire, counted in the same
        way; those that go with Flower's messages are not among them.
    wall_s : float
        Wall-clock seconds that the round took on this machine.
    participants : tuple of int
        Devices that completed their training.
    late : tuple of int
        Devices that the round did not wait for, on the modelled system.
    arrived : tuple of Arrival
        Devices that came late from a round before, and are part of this one's aggregate.
    left : tuple of int
        Devices that left the round in the midst of it (``fleet.dropout``).
    exhausted : tuple of int
        Devices that take no part from this round on, as their energy is spent (``fleet.budget_j``).
    failures : tuple of Failure
        Devices that did not, and edges that failed, in training or evaluation.
    modelled : mapping or None
        What the round costs on the modelled system (``delay_s``, ``energy_j``, ...): never mixed
        with what was measured.
    phases : mapping or None
        Seconds of all turns that trained, measured beside modelled (``measured_s``,
        ``modelled_s``), by phase: ``compute``, ``link``, ``wait``.
    aggregation_error : float or None
        How far the adapters that came of the round are from the mean of what its branches do
        (`fedsplit.execution.aggregate.aggregation_error`), or, where it is larger, those that came
        of a wave; None where nothing was averaged.
    token_accuracy : float or None
        Share of test tokens that the model held for the likeliest, where it is asked for.
    central : mapping or None
        What the server measured on a test set of its own: ``loss`` (nats per target) and, as for
        the devices, ``perplexity``, ``accuracy``, ``token_accuracy``.
    written : tuple of Written
        What the model wrote after the configured prompts.
    privacy : mapping or None
        What the run has spent so far where devices add noise: ``epsilon`` and ``delta``, the
        ``unit`` they are said of, and how often a sample was used at most (``evaluated``, and
        ``trained`` by device).
    """

    round: int
    train_loss: float | None = None
    eval_loss: float | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    bytes_up: Mapping[str, int] = field(default_factory=dict)
    bytes_down: Mapping[str, int] = field(default_factory=dict)
    adapter_bytes_up: Mapping[str, int] = field(default_factory=dict)
    adapter_bytes_down: Mapping[str, int] = field(default_factory=dict)
    wall_s: float = 0.0
    participants: tuple[int, ...] = ()
    failures: tuple[Failure, ...] = ()
    modelled: Mapping[str, Any] | None = None
    phases: Mapping[str, Mapping[str, float]] | None = None
    aggregation_error: float | None = None
    late: tuple[int, ...] = ()
    arrived: tuple[Arrival, ...] = ()
    left: tuple[int, ...] = ()
    exhausted: tuple[int, ...] = ()
    token_accuracy: float | None = None
    central: Mapping[str, Any] | None = None
    written: tuple[Written, ...] = ()
    privacy: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values; a number that is not finite becomes null.

        What a run has only if it is asked for is absent where there is none.
        """
        values: dict[str, Any] = _finite(asdict(self))
        return {
            name: item
            for name, item in values.items()
            if item not in _NOTHING or name not in _ASKED_FOR
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RoundRecord":
        """Return the record that `to_json` wrote.

        Raises
        ------
        FedsplitError
            If a field is unknown or of the wrong type.
        """
        try:
            return from_mapping(cls, values, "record")
        except FedsplitError as error:
            raise FedsplitError(f"results.json: {error}") from error

    def flat(self) -> dict[str, Any]:
        """Return the record as one row: nested keys joined by dots, tuples as their lengths."""
        row: dict[str, Any] = {}
        for name, value in self.to_json().items():
            if name == "written":
                continue
            if isinstance(value, list):
                row[name] = len(value)
            elif isinstance(value, dict):
                row.update(_leaves(name, value))
            elif name != "modelled":
                row[name] = value
        return row


_ASKED_FOR = (
    "phases",
    "aggregation_error",
    "late",
    "arrived",
    "left",
    "exhausted",
    "token_accuracy",
    "central",
    "written",
    "privacy",
)
_NOTHING: tuple[Any, ...] = (None, [])


def _finite(value: Any) -> Any:
    """Return `value` with lists for sequences and None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _leaves(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and texts inside `values` under dotted names; lists are left out."""
    row: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            row.update(_leaves(f"{prefix}.{key}", value))
        elif not isinstance(value, list):
            row[f"{prefix}.{key}"] = value
    return row
