"""What travels in Flower messages: a task to a device, its answer, and adapters both ways."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsplit.data import DataSpec
from fedsplit.errors import FedsplitError, require, require_choice
from fedsplit.execution import OptimizerSpec
from fedsplit.flower.link_settings import PLAIN, SECURITIES
from fedsplit.mapping import T, from_mapping, to_mapping
from fedsplit.models import ModelSpec
from fedsplit.plan import CodecPlan
from fedsplit.transport import TurnBounds
from fedsplit.transport.connection import PING_S

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

HELLO, TRAIN, EVALUATE, EDGE = "query.node", "train.device", "evaluate.device", "train.edge"
_FLOWERS_WORDS = "occurred. Message: "
_ARRAYS, _TASK, _METRICS, _INFO = "arrays", "task", "metrics", "info"


@dataclass(frozen=True)
class Job:
    """What stays the same for all turns of a run and every node has to know.

    Parameters
    ----------
    model, data : ModelSpec, DataSpec
        The model to fine-tune and the data that the devices hold.
    optimizer : OptimizerSpec
        The optimizer of every segment; it starts fresh at each turn.
    n_devices : int
        Devices that the data is split over.
    batch_size : int
        Samples per mini-batch, in training and evaluation.
    seed : int
        Root of every random draw.
    threads : int
        Torch threads of a device process; fixed, because sums depend on it.
    accelerator : str
        ``auto`` (a GPU when there is one), ``cpu`` or a torch device name.
    source : str
        Hash of the server's fedsplit source; a device with another one is refused.
    connect_s : float
        How long a device waits for the first server of its route to come up.
    security : str
        What the run's link is: "plain", "tls", or "mutual" (nodes show certificates too).
    ping_s : float
        Seconds between keep-alive pings on links and presence.
    """

    model: ModelSpec
    data: DataSpec
    optimizer: OptimizerSpec
    n_devices: int
    batch_size: int
    seed: int
    threads: int = 1
    accelerator: str = "auto"
    source: str = ""
    connect_s: float = 60.0
    security: str = PLAIN
    ping_s: float = PING_S

    def bounds(self, steps: int) -> TurnBounds:
        """Return how much a turn of so many mini-batches may ask of a server."""
        return TurnBounds(samples=self.batch_size, tokens=self.data.seq_len, steps=steps)

    def __post_init__(self) -> None:
        require_choice("security", self.security, SECURITIES)
        for name in ("n_devices", "batch_size", "threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True)
class Contact:
    """Where a node shows its presence while it works on a task, and the token that lets it in."""

    address: str
    token: str


@dataclass(frozen=True)
class TurnTask:
    """What a device is told to do in one turn.

    `address` and `token` open the link to the first server of the route; both are empty on a
    route that never leaves the device. `seed` is the turn's, the same on every tier. With
    `adapters_on_link` the adapters go over the link, both ways, and not with Flower's messages.
    A device that is started `ahead` of its turn gets ready and is told `address` and `token` over
    its presence when the turn begins.
    `repeat` is the turn's: each draws mini-batches of its own.
    """

    job: Job
    contact: Contact
    server_round: int
    device: int
    route: str
    n_blocks: int
    steps: int = 0
    codec: CodecPlan = field(default_factory=CodecPlan)
    address: str = ""
    token: str = ""
    seed: int = 0
    adapters_on_link: bool = False
    ahead: bool = False
    repeat: int = 0


def task_message(
    node_id: int,
    kind: str,
    task: "DataclassInstance",
    arrays: Mapping[str, Tensor] | None = None,
) -> Message:
    """Return the message that carries `task` and adapters to a node."""
    content = RecordDict({_TASK: ConfigRecord({"json": json.dumps(to_mapping(task))})})
    if arrays is not None:
        content[_ARRAYS] = to_record(arrays)
    return Message(content, node_id, kind)


def read_task(message: Message, kind: type[T]) -> T:
    """Return the task in `message`.

    Raises
    ------
    FedsplitError
        If the message carries none, or one of another version.
    """
    records = message.content.config_records
    if _TASK not in records:
        raise FedsplitError("message: carries no fedsplit task; is another server app running?")
    return from_mapping(kind, json.loads(str(records[_TASK]["json"])), "task")


def answer(
    message: Message,
    metrics: Mapping[str, float],
    info: Mapping[str, str] | None = None,
    arrays: Mapping[str, Tensor] | None = None,
) -> Message:
    """Return the reply to `message` with `metrics`, text `info` and adapters."""
    content = RecordDict(
        {_METRICS: MetricRecord(dict(metrics)), _INFO: ConfigRecord(dict(info or {}))}
    )
    if arrays is not None:
        content[_ARRAYS] = to_record(arrays)
    return Message(content, reply_to=message)


def read_metrics(message: Message) -> dict[str, float]:
    """Return the numbers of a reply."""
    record = message.content.metric_records[_METRICS]
    return {key: float(value) for key, value in record.items() if not isinstance(value, list)}


def read_info(message: Message) -> dict[str, str]:
    """Return the texts of a reply."""
    return {key: str(value) for key, value in message.content.config_records[_INFO].items()}


def read_error(message: Message) -> str:
    """Return why a node could not answer, in its own words, without Flower's and Ray's traces."""
    reason = str(message.error.reason)
    _, found, words = reason.rpartition(_FLOWERS_WORDS)
    return words.strip().removesuffix("'>").strip() if found else reason


def to_record(arrays: Mapping[str, Tensor]) -> ArrayRecord:
    """Return `arrays` as a Flower record; bfloat16, which Flower cannot hold, becomes float32."""
    return ArrayRecord(
        {
            name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu()
            for name, tensor in arrays.items()
        }
    )


def read_arrays(message: Message) -> dict[str, Tensor]:
    """Return the adapters in `message` (none if it carries none)."""
    record = message.content.array_records.get(_ARRAYS)
    return dict(record.to_torch_state_dict()) if record is not None else {}
