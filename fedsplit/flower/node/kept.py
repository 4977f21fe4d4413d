"""What a device keeps from turn to turn, in the state that Flower keeps of a node."""

from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from torch import Tensor

from fedsplit.codec import Entry, Remembered
from fedsplit.execution import State
from fedsplit.flower.messages import to_record

_TENSORS, _NUMBERS = "fedsplit.optimizer.tensors", "fedsplit.optimizer.numbers"
_ROWS, _OF = "fedsplit.codec.rows", "fedsplit.codec.of"
_BETWEEN = "|"  # in no parameter's name, and in no stream's


def read_state(context: Context) -> dict[str, State]:
    """Return what the device's last turn left there, by parameter; nothing before the first."""
    found: dict[str, State] = {}
    arrays = context.state.array_records.get(_TENSORS)
    numbers = context.state.config_records.get(_NUMBERS)
    for values in ({} if arrays is None else arrays.to_torch_state_dict(), numbers or {}):
        for key, value in values.items():
            name, _, entry = key.rpartition(_BETWEEN)
            found.setdefault(name, {})[entry] = value
    return found


def write_state(context: Context, kept: Mapping[str, State]) -> None:
    """Leave `kept` there in place of all that was: of what is trained elsewhere now, nothing."""
    flat = {
        f"{name}{_BETWEEN}{entry}": value
        for name, state in kept.items()
        for entry, value in state.items()
        if value is not None
    }
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    numbers = {key: value for key, value in flat.items() if not isinstance(value, Tensor)}
    context.state[_TENSORS] = to_record(tensors) if tensors else ArrayRecord()
    context.state[_NUMBERS] = ConfigRecord(numbers)


def read_remembered(context: Context) -> Remembered:
    """Return what the codecs of the device's last turn left there; nothing before the first."""
    rows, of = context.state.array_records.get(_ROWS), context.state.config_records.get(_OF)
    if rows is None or of is None:
        return Remembered()
    found: dict[str, list[tuple[int, Entry]]] = {}
    for key, row in rows.to_torch_state_dict().items():
        stream, sample, age = key.split(_BETWEEN)
        entry = Entry(row.view(torch.bfloat16), int(age))
        found.setdefault(stream, []).append((int(sample), entry))
    streams = {stream: tuple(entries) for stream, entries in found.items()}
    return Remembered(str(of["of"]), streams)


def write_remembered(context: Context, remembered: Remembered) -> None:
    """Leave what the codecs remember there in place of all that was."""
    context.state[_ROWS] = ArrayRecord(
        {
            # Flower holds no bfloat16.
            _BETWEEN.join((stream, str(sample), str(entry.age))): entry.row.view(torch.int16)
            for stream, entries in remembered.streams.items()
            for sample, entry in entries
        }
    )
    context.state[_OF] = ConfigRecord({"of": remembered.of})
