"""A device's side of a run: what it answers to each Flower message."""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from logging import INFO
from typing import Any, TypeAlias

import torch
from flwr.app import Context, Message
from flwr.supercore import log
from transformers import AutoTokenizer

from fedsplit.data import (
    DataSpec,
    DeviceCounts,
    DeviceData,
    FederatedData,
    RowSamples,
    Samples,
    batches,
    confine,
    draw,
    load_data,
    load_device,
    training_batches,
)
from fedsplit.data.partition import LOCAL
from fedsplit.errors import FedsplitError, SettingsError
from fedsplit.execution import TurnResult, evaluate_turn, train_turn
from fedsplit.execution.peak import forget_peak, peak_bytes
from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.messages import MOST_FILES, answer, read_arrays, read_task
from fedsplit.flower.node.kept import (
    read_remembered,
    read_state,
    write_remembered,
    write_state,
)
from fedsplit.flower.node.models import cached_model
from fedsplit.flower.source import source_hash
from fedsplit.flower.tasks import Contact, Job, TurnTask
from fedsplit.mapping import from_mapping, to_mapping
from fedsplit.measured import MeasuredProfile
from fedsplit.models import ModelSpec, SplitModel
from fedsplit.models.names import IMAGES
from fedsplit.plan import DEVICE, AdapterWay
from fedsplit.seeds import generator
from fedsplit.transport import GrpcLink, Presence

Rows: TypeAlias = Sequence[Mapping[str, Any]]
"""Samples as a data set of the `datasets` library or a list has them: one mapping of the model's
inputs each, all of equal shapes."""
Loader: TypeAlias = Callable[[Context], tuple[Samples | Rows, Samples | Rows]]
"""``load_data(context) -> train, test``: a device's own data."""


# Samples that a process keeps of the devices that it plays, so that they are not made again at each
# turn. Those of 128 tokens take some 2 KiB; a device's tensors by themselves what some 100 short
# ones do.
_KEPT, _DEVICE = 100_000, 100


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
        self._kept: dict[object, tuple[Samples, Samples]] = {}
        self._count = 0  # of what is kept, in samples

    def hello(self, message: Message, context: Context) -> Message:
        """Say which device this node is, what data it holds and which source it runs."""
        job: Job = read_task(message, Job)
        LinkSettings.of_node(context.node_config).client_tls(job.security)
        index = device_index(context)
        if not 0 <= index < job.n_devices:
            raise SettingsError("partition-id", index, f"in 0..{job.n_devices - 1}")
        train, test = self._data(job, context)
        counts = DeviceCounts(train=train.counts, test=test.counts)
        return answer(
            message,
            {"index": index, "n-train": len(train), "n-test": len(test), **counts.flat()},
            {
                "source": source_hash(),
                "role": "device",
                "site": str(context.node_config.get("site", "")),
                "left-out": json.dumps(self._left_out(job, context)[:MOST_FILES]),
                "profile": own_profile(context),
            },
        )

    def train(self, message: Message, context: Context) -> Message:
        """Train one turn and answer with the device's adapters."""
        task = _read(message, context)
        with _present(task, context) as presence:
            job, turn, model = task.job, task.turn, _load(task)
            data, _ = self._data(job, context)
            again = [turn.repeat] if turn.repeat else []
            keeps = job.optimizer.keep_order
            since = [] if keeps else [task.server_round]
            rng = generator(job.seed, "batches", *since, turn.device, *again)
            skipped = (task.server_round - 1) * turn.steps if keeps else 0
            link, token = _dial(task, context, presence)
            remembered = read_remembered(context) if turn.codec.over_turns else None
            started = time.perf_counter()
            forget_peak()
            result = train_turn(
                model,
                turn.route,
                training_batches(data, job.batch_size, rng, turn.steps, skipped),
                adapters=_adapters(task, message),
                optimizer=job.optimizer,
                seed=task.seed,
                steps=turn.steps,
                kept=read_state(context) if job.optimizer.keep_state else None,
                link=link,
                token=token,
                codec=turn.codec,
                privacy=job.privacy,
                rank=turn.rank,
                frozen=turn.frozen,
                remembered=remembered,
            )
            wall_s = time.perf_counter() - started
            log(INFO, "device %s: %s steps, loss %.4f", turn.device, result.steps, result.loss)
            if job.optimizer.keep_state:
                write_state(context, result.state)
            if remembered is not None:
                write_remembered(context, remembered)
            sent = task.way is AdapterWay.MESSAGE and not turn.frozen
            trained = result.adapters if sent else None
            return answer(message, _metrics(result, wall_s), arrays=trained)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Evaluate the adapters on the device's test data."""
        task = _read(message, context)
        with _present(task, context) as presence:
            job, turn, model = task.job, task.turn, _load(task)
            _, held = self._data(job, context)
            data = draw(held, job.max_eval_samples, generator(job.seed, "evaluate", turn.device))
            link, token = _dial(task, context, presence)
            started = time.perf_counter()
            forget_peak()
            result = evaluate_turn(
                model,
                turn.route,
                batches(data, job.batch_size),
                adapters=_adapters(task, message),
                seed=task.seed,
                link=link,
                token=token,
                codec=turn.codec,
                privacy=job.privacy,
            )
            return answer(message, _metrics(result, time.perf_counter() - started))

    def _left_out(self, job: Job, context: Context) -> tuple[str, ...]:
        """Return the files beside the data that were not read, if the server named them itself."""
        if self._loader is not None or job.data is None or job.data.partition == LOCAL:
            return ()
        return named_data(job, context.node_config.get("data-root")).left_out

    def _data(self, job: Job, context: Context) -> tuple[Samples, Samples]:
        """Return the samples to train and to test on; a process keeps those of a few devices."""
        index, data = device_index(context), job.data
        key = job.data_text, tuple(sorted(context.node_config.items()))
        if key not in self._kept:
            if self._loader is not None:
                given = self._loader(context)
                samples = _samples("train", given[0]), _samples("test", given[1])
            elif data is not None and data.partition == LOCAL:
                own = _own_data(job, index, context)
                samples = own.train, own.test
            else:
                named = named_data(job, context.node_config.get("data-root"))
                samples = named.train(index), named.test(index)
            self._kept[key] = samples
            self._count += _DEVICE + sum(map(len, samples))
            while self._count > _KEPT and len(self._kept) > 1:
                oldest = self._kept.pop(next(iter(self._kept)))
                self._count -= _DEVICE + sum(map(len, oldest))
            return samples
        return self._kept[key]


def own_profile(context: Context) -> str:
    """Return the text of this node's file of `fedsplit measure`; empty if it names none."""
    path = context.node_config.get("profile")
    return "" if path is None else json.dumps(to_mapping(MeasuredProfile.read(str(path))))


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


def _present(task: TurnTask, context: Context) -> AbstractContextManager[Presence | None]:
    return nullcontext() if task.presence is None else at_work(task.presence, context, task.job)


def named_data(job: Job, root: object = None) -> FederatedData:
    """Return the data set that a job names, read once in a process.

    Parameters
    ----------
    job : Job
        The run's.
    root : object
        The node's ``data-root``: the only folder that files may be named of; None allows all.

    Raises
    ------
    FedsplitError
        If it names none, one that cannot be read, or one outside the node's ``data-root``.
    """
    if job.data is None:
        raise FedsplitError("data: the server names none, so this node needs a loader of its own")
    return _load_data(job.data_text, None if root is None else str(root))


def _own_data(job: Job, index: int, context: Context) -> DeviceData:
    """Read the data that only this node has: its ``data-path``, or what a simulation gives it."""
    assert job.data is not None
    path = context.node_config.get("data-path")
    if path is None and job.data_paths is not None and index < len(job.data_paths):
        root = context.node_config.get("data-root")
        named = replace(job.data, path=job.data_paths[index])
        path = confine(named, None if root is None else str(root)).path
    return load_device(
        job.data,
        _tokenizer(job.model),
        device=index,
        n_devices=job.n_devices,
        seed=job.seed,
        path=None if path is None else str(path),
    )


def _tokenizer(spec: ModelSpec) -> Any:
    if spec.task == IMAGES or spec.source is None:
        return None
    return AutoTokenizer.from_pretrained(spec.source)


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
    task: TurnTask, context: Context, presence: Presence | None
) -> tuple[GrpcLink | None, str | None]:
    """Return the link of a turn and what opens it, once the turn begins; none if it needs none."""
    door = task.door
    if task.ahead:
        assert presence is not None
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


@lru_cache(maxsize=1)
def _load_data(text: str, root: str | None) -> FederatedData:
    data, model, n_devices, seed, _ = json.loads(text)
    spec = confine(from_mapping(DataSpec, data, "data"), root)
    tokenizer = _tokenizer(from_mapping(ModelSpec, model, "model"))
    return load_data(spec, tokenizer, n_devices, seed)


def _metrics(result: TurnResult, wall_s: float) -> dict[str, float]:
    classes = {f"class-{place}": count for place, count in enumerate(result.classes)}
    return {
        **classes,
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
        "peak-bytes": peak_bytes(),
    }
