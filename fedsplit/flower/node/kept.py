"""What a device's optimizer keeps from turn to turn, in the state that Flower keeps of a node."""

from collections.abc import Mapping

from flwr.app import ArrayRecord, ConfigRecord, Context
from torch import Tensor

from fedsplit.execution import State
from fedsplit.flower.messages import to_record

_TENSORS, _NUMBERS = "fedsplit.optimizer.tensors", "fedsplit.optimizer.numbers"
_BETWEEN = "|"  # in no parameter's name


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
