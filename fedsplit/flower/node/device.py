"""A device's side of a run: what it answers to each Flower message."""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from logging import INFO
from typing import Any, TypeAlias

import torch
from flwr.app import Context, Message
from flwr.supercore import log
from transformers import AutoTokenizer

from fedsplit.data import (
    DataSpec,
    FederatedData,
    RowSamples,
    Samples,
    batches,
    load_data,
    training_batches,
)
from fedsplit.errors import FedsplitError, SettingsError
from fedsplit.execution import TurnResult, evaluate_turn, train_turn
from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.messages import answer, read_arrays, read_task
from fedsplit.flower.node.models import cached_model
from fedsplit.flower.source import source_hash
from fedsplit.flower.tasks import Contact, Job, TurnTask
from fedsplit.mapping import from_mapping, to_mapping
from fedsplit.models import ModelSpec, SplitModel
from fedsplit.plan import DEVICE, AdapterWay
from fedsplit.seeds import generator
from fedsplit.transport import GrpcLink, Presence

Rows: TypeAlias = Sequence[Mapping[str, Any]]
"""Samples as a data set of the `datasets` library or a list has them: one mapping of the model's
inputs each, all of equal shapes."""
Loader: TypeAlias = Callable[[Context], tuple[Samples | Rows, Samples | Rows]]
"""``load_data(context) -> train, test``: a device's own data."""


class Device:
    """A device: its data, and what it answers.

    Parameters
    ----------
    loader : callable, optional
        Loads this device's own data, which then leave it in no form but boundaries; by default
        its part of the data set that the job names.
    """

    def __init__(self, loader: Loader | None = None) -> None:
        self._loader = loader
        self._own: dict[int, tuple[Samples, Samples]] = {}

    def hello(self, message: Message, context: Context) -> Message:
        """Say which device this node is, what data it holds and which source it runs."""
        job: Job = read_task(message, Job)
        LinkSettings.of_node(context.node_config).client_tls(job.security)
        index = device_index(context)
        if not 0 <= index < job.n_devices:
            raise SettingsError("partition-id", index, f"in 0..{job.n_devices - 1}")
        train, test = self._data(job, context)
        return answer(
            message,
            {"index": index, "n-train": len(train), "n-test": len(test)},
            {"source": source_hash(), "role": "device"},
        )

    def train(self, message: Message, context: Context) -> Message:
        """Train one turn and answer with the device's adapters."""
        task = _read(message, context)
        with at_work(task.presence, context, task.job) as presence:
            job, turn, model = task.job, task.turn, _load(task)
            data, _ = self._data(job, context)
            again = [turn.repeat] if turn.repeat else []
            rng = generator(job.seed, "batches", task.server_round, turn.device, *again)
            link, token = _dial(task, context, presence)
            started = time.perf_counter()
            result = train_turn(
                model,
                turn.route,
                training_batches(data, job.batch_size, rng, turn.steps),
                adapters=_adapters(task, message),
                optimizer=job.optimizer,
                seed=task.seed,
                link=link,
                token=token,
                codec=turn.codec,
            )
            wall_s = time.perf_counter() - started
            log(INFO, "device %s: %s steps, loss %.4f", turn.device, result.steps, result.loss)
            trained = result.adapters if task.way is AdapterWay.MESSAGE else None
            return answer(message, _metrics(result, wall_s), arrays=trained)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Evaluate the adapters on the device's test data."""
        task = _read(message, context)
        with at_work(task.presence, context, task.job) as presence:
            job, turn, model = task.job, task.turn, _load(task)
            _, data = self._data(job, context)
            link, token = _dial(task, context, presence)
            started = time.perf_counter()
            result = evaluate_turn(
                model,
                turn.route,
                batches(data, job.batch_size),
                adapters=_adapters(task, message),
                seed=task.seed,
                link=link,
                token=token,
                codec=turn.codec,
            )
            return answer(message, _metrics(result, time.perf_counter() - started))

    def _data(self, job: Job, context: Context) -> tuple[Samples, Samples]:
        """Return the samples to train and to test on."""
        index = device_index(context)
        if self._loader is None:
            data = named_data(job)
            return data.train(index), data.test(index)
        if index not in self._own:
            train, test = self._loader(context)
            self._own[index] = _samples("train", train), _samples("test", test)
        return self._own[index]


def device_index(context: Context) -> int:
    """Return the device that a node is, from Flower's node configuration.

    Raises
    ------
    FedsplitError
        If the node was started without ``partition-id``.
    """
    value = context.node_config.get("partition-id")
    if value is None:
        raise FedsplitError('node-config: must hold partition-id, such as "partition-id=0"')
    return int(value)


def at_work(contact: Contact, context: Context, job: Job) -> Presence:
    """Show this node's presence at the server while it works on a task."""
    if context.node_config.get("role", "device") == "edge":
        who = f"edge {int(context.node_config['edge-id'])}"
    else:
        who = f"device {device_index(context)}"
    return Presence(
        contact.address,
        contact.token,
        who,
        tls=LinkSettings.of_node(context.node_config).client_tls(job.security),
        connect_timeout_s=job.patience.connect_s,
        ping_s=job.patience.ping_s,
    )


def named_data(job: Job) -> FederatedData:
    """Return the data set that a job names, read once in a process.

    Raises
    ------
    FedsplitError
        If it names none, or one that cannot be read.
    """
    if job.data is None:
        raise FedsplitError("data: the server names none, so this node needs a loader of its own")
    return _load_data(_key(job.data), _key(job.model), job.n_devices, job.seed)


def _samples(part: str, given: Samples | Rows) -> Samples:
    if len(given) == 0 and part == "train":
        raise FedsplitError("load_data: returned no training samples")
    # A data set of the `datasets` library has a `select` too, which selects rows.
    own = hasattr(given, "select") and not hasattr(given, "column_names")
    return given if own else RowSamples(given)  # type: ignore[return-value,arg-type]


def _read(message: Message, context: Context) -> TurnTask:
    task: TurnTask = read_task(message, TurnTask)
    index = device_index(context)
    if task.turn.device != index:
        raise FedsplitError(f"device={task.turn.device}: this node is {index}")
    return task


def _adapters(task: TurnTask, message: Message) -> Mapping[str, torch.Tensor] | None:
    """Return the adapters to start from; None if they come over the link."""
    return read_arrays(message) if task.way is AdapterWay.MESSAGE else None


def _load(task: TurnTask) -> SplitModel:
    torch.set_num_threads(task.job.threads)
    return cached_model(task.job, task.turn.route.on(DEVICE))


def _dial(
    task: TurnTask, context: Context, presence: Presence
) -> tuple[GrpcLink | None, str | None]:
    """Return the link of a turn and what opens it, once the turn begins; none if it needs none."""
    door = task.door
    if task.ahead:
        words = presence.wait_for_words(threading.TIMEOUT_MAX)  # or until the server is gone
        door = Contact(str(words["address"]), str(words["token"]))
    if door is None:
        return None, None
    patience = task.job.patience
    link = GrpcLink(
        door.address,
        tls=LinkSettings.of_node(context.node_config).client_tls(task.job.security),
        connect_timeout_s=patience.connect_s,
        reply_timeout_s=patience.reply_s,
        ping_s=patience.ping_s,
    )
    return link, door.token


def _key(value: ModelSpec | DataSpec) -> str:
    return json.dumps(to_mapping(value), sort_keys=True)


@lru_cache(maxsize=1)
def _load_data(data: str, model: str, n_devices: int, seed: int) -> FederatedData:
    spec = from_mapping(ModelSpec, json.loads(model), "model")
    tokenizer = None
    if spec.task == "causal-lm" and spec.source is not None:
        tokenizer = AutoTokenizer.from_pretrained(spec.source)
    return load_data(from_mapping(DataSpec, json.loads(data), "data"), tokenizer, n_devices, seed)


def _metrics(result: TurnResult, wall_s: float) -> dict[str, float]:
    return {
        "loss-sum": result.loss_sum,
        "n-targets": result.n_targets,
        "n-correct": result.n_correct if result.n_correct is not None else -1,
        "n-samples": result.n_samples,
        "steps": result.steps,
        "bytes-up": result.stats.up_bytes,
        "bytes-down": result.stats.down_bytes,
        "adapters-up": result.stats.up_adapter_bytes,
        "adapters-down": result.stats.down_adapter_bytes,
        "compute-s": result.compute_s,
        "link-s": result.link_s,
        "wall-s": wall_s,
    }
