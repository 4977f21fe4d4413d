"""Flower messages: a task to a node, its answer, and adapters both ways."""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedsplit.errors import NodeLost
from fedsplit.flower.tasks import EdgeTask, Job, TurnTask
from fedsplit.mapping import T, from_mapping, hints_of, to_mapping

HELLO, TRAIN, EVALUATE, EDGE = "query.node", "train.device", "evaluate.device", "train.edge"
MOST_COUNTED = 1 << 53
MOST_FILES = 100
"""Files that a node lists at most."""
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_MOST_HEADER = 10_000
NUMPY = "numpy.ndarray"
_FLOWERS_WORDS = "occurred. Message: "
_ARRAYS, _TASK, _METRICS, _INFO = "arrays", "task", "metrics", "info"
_OWN, _JOB = "json", "job"


def task_message(
    node_id: int,
    kind: str,
    task: Job | TurnTask | EdgeTask,
    arrays: Mapping[str, Tensor] | ArrayRecord | None = None,
) -> Message:
    """Return the message that carries `task` and adapters to a node."""
    if isinstance(task, Job):
        texts = {_OWN: task.text}
    else:
        # The job is a part of its own, which a process that gets many tasks reads once.
        nowhere: Any = None
        values = to_mapping(replace(task, job=nowhere))
        del values[_JOB]
        texts = {_OWN: json.dumps(values), _JOB: task.job.text}
    content = RecordDict({_TASK: ConfigRecord(dict(texts))})
    if arrays is not None:
        content[_ARRAYS] = arrays if isinstance(arrays, ArrayRecord) else to_record(arrays)
    return Message(content, node_id, kind)


def read_task(message: Message, kind: type[T]) -> T:
    """Return the task in `message`.

    Raises
    ------
    NodeLost
        If the message carries none, or one of another version.
    """
    records = message.content.config_records
    if _TASK not in records:
        raise NodeLost("message: carries no fedsplit task; is another server app running?")
    own, job = str(records[_TASK][_OWN]), records[_TASK].get(_JOB)
    if job is None:
        whole: T = _read_job(kind, own)
        return whole
    values = json.loads(own)
    values[_JOB] = _read_job(hints_of(kind)[_JOB], str(job))
    return from_mapping(kind, values, "task")


@lru_cache(maxsize=4)
def _read_job(kind: type[T], text: str) -> T:
    return from_mapping(kind, json.loads(text), f"task.{_JOB}")


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
    """Return the numbers of a reply.

    Raises
    ------
    NodeLost
        If it carries none, or one that is no finite number.
    """
    record = message.content.metric_records.get(_METRICS)
    if record is None:
        raise NodeLost("answer: must carry metrics")
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise NodeLost(f"answer: {name!r:.80}={value!r:.80} must be a finite number")
        numbers[name] = value
    return numbers


def read_count(metrics: Mapping[str, float], name: str, least: int = 0) -> int:
    """Return the count `name` of what `read_metrics` returned.

    Raises
    ------
    NodeLost
        If it is absent, below `least`, or too large to be counted exactly.
    """
    value = metrics.get(name)
    if value is None or value != int(value) or not least <= value <= MOST_COUNTED:
        raise NodeLost(f"answer: {name}={value!r} must be a whole number from {least}")
    return int(value)


def read_info(message: Message) -> dict[str, str]:
    """Return the texts of a reply (none if it carries none)."""
    record = message.content.config_records.get(_INFO)
    return {key: str(value) for key, value in record.items()} if record is not None else {}


def read_error(message: Message) -> str:
    """Return why a node could not answer, in its own words, without Flower's and Ray's traces."""
    reason = str(message.error.reason)
    _, found, words = reason.rpartition(_FLOWERS_WORDS)
    return words.strip().removesuffix("'>").strip() if found else reason


def to_record(arrays: Mapping[str, Tensor]) -> ArrayRecord:
    """Return `arrays` as a Flower record; bfloat16, which Flower cannot hold, becomes float32."""
    return ArrayRecord({name: holdable(tensor) for name, tensor in arrays.items()})


def holdable(tensor: Tensor) -> Tensor:
    """Return a tensor as a Flower record can hold it: here, and not in bfloat16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu()


def read_arrays(
    message: Message, expected: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the adapters in `message` (none if it carries none).

    Parameters
    ----------
    message : Message
        What a node sent.
    expected : mapping of str to Tensor, optional
        What they must be like: the same names, shapes and types.

    Raises
    ------
    NodeLost
        If the bytes of one are not what they say they are, or not what is expected.
    """
    record = message.content.array_records.get(_ARRAYS)
    if record is None:
        return {}
    found = {name: _tensor(name, array) for name, array in record.items()}
    if expected is None:
        return found
    if found.keys() != expected.keys():
        raise NodeLost(f"adapters: {len(found)} came back of {len(expected)} handed out")
    for name, tensor in found.items():
        like = expected[name]
        dtype = torch.float32 if like.dtype == torch.bfloat16 else like.dtype
        if tensor.shape != like.shape or tensor.dtype != dtype:
            raise NodeLost(
                f"adapter {name!r}: came back as {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"must be {dtype} of {tuple(like.shape)}"
            )
    return found


def _tensor(name: str, array: Array) -> Tensor:
    try:
        return torch.from_numpy(read_array(array))
    except (ValueError, TypeError, LookupError, SyntaxError, OverflowError) as error:
        raise NodeLost(f"adapter {name!r:.80}: cannot be read ({error!s:.80})") from None


def read_array(array: Array) -> NDArray[Any]:
    """Read an array without believing its header: nothing is allocated before its size is known.

    Raises
    ------
    ValueError, TypeError, LookupError, SyntaxError, OverflowError
        If its bytes are not what they say they are.
    """
    data = array.data
    start = 10 + int.from_bytes(data[8:10], "little")
    if data[6] != 1:
        start = 12 + int.from_bytes(data[8:12], "little")
    shape, fortran, dtype = _header(data[:start])
    left = len(data) - start
    if array.stype != NUMPY or dtype.hasobject or math.prod(shape) * dtype.itemsize != left:
        raise ValueError("its bytes do not fit its header")
    values = np.frombuffer(data, dtype, offset=start)
    return np.array(values.reshape(shape, order="F" if fortran else "C"), order="C")


@lru_cache(maxsize=256)
def _header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read what stands before an array's values; numpy takes longer for it than for them."""
    stream = io.BytesIO(head)
    read = _HEADERS[np.lib.format.read_magic(stream)]
    shape, fortran, dtype = read(stream, max_header_size=_MOST_HEADER)
    if stream.tell() != len(head):
        raise ValueError("its header is not as long as it says")
    return shape, fortran, dtype
