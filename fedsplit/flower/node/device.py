"""A device's side of a run: what it answers to each Flower message."""

import json
import threading
import time
from functools import lru_cache
from logging import INFO

import torch
from flwr.app import Context, Message
from flwr.supercore import log
from transformers import AutoTokenizer

from fedsplit.data import DataSpec, FederatedData, batches, load_data, training_batches
from fedsplit.errors import FedsplitError
from fedsplit.execution import TurnResult, evaluate_turn, train_turn
from fedsplit.flower.link_settings import LinkSettings
from fedsplit.flower.messages import Contact, Job, TurnTask, answer, read_arrays, read_task
from fedsplit.flower.node.models import cached_model
from fedsplit.flower.source import source_hash
from fedsplit.mapping import from_mapping, to_mapping
from fedsplit.models import ModelSpec, SplitModel
from fedsplit.plan import DEVICE, Route
from fedsplit.seeds import generator
from fedsplit.transport import GrpcLink, Presence


def hello(message: Message, context: Context) -> Message:
    """Say which device this node is, what data it holds and which source it runs."""
    job: Job = read_task(message, Job)
    if context.node_config.get("role", "device") == "edge":
        return _hello_edge(message, context, job)
    LinkSettings.of_node(context.node_config).client_tls(job.security)
    index = device_index(context)
    if not 0 <= index < job.n_devices:
        raise FedsplitError(f"partition-id={index}: must be in 0..{job.n_devices - 1}")
    data = _data(job)
    return answer(
        message,
        {
            "index": index,
            "n-train": len(data.train(index)),
            "n-test": len(data.test(index)),
        },
        {"source": source_hash(), "role": "device"},
    )


def _hello_edge(message: Message, context: Context, job: Job) -> Message:
    settings = context.node_config
    for key in ("edge-id", "bind"):
        if key not in settings:
            raise FedsplitError(f"node-config: an edge must hold {key}")
    link = LinkSettings.of_node(settings)
    link.server_tls(job.security)
    link.client_tls(job.security)
    return answer(
        message,
        {"index": int(settings["edge-id"])},
        {"source": source_hash(), "role": "edge", "address": str(link.advertise or link.bind)},
    )


def train(message: Message, context: Context) -> Message:
    """Train one turn and answer with the device's adapters."""
    task = _read(message, context)
    with at_work(task.contact, context, task.job) as presence:
        return _train(task, message, context, presence)


def _train(task: TurnTask, message: Message, context: Context, presence: Presence) -> Message:
    route, model = _load(task)
    job = task.job
    data = _data(job).train(task.device)
    again = [task.repeat] if task.repeat else []
    rng = generator(job.seed, "batches", task.server_round, task.device, *again)
    link, token = _dial(task, context, presence)
    started = time.perf_counter()
    result = train_turn(
        model,
        route,
        training_batches(data, job.batch_size, rng, task.steps),
        adapters=None if task.adapters_on_link else read_arrays(message),
        optimizer=job.optimizer,
        seed=task.seed,
        link=link,
        token=token,
        codec=task.codec,
    )
    wall_s = time.perf_counter() - started
    log(INFO, "device %s: %s steps, loss %.4f", task.device, result.steps, result.loss)
    trained = None if task.adapters_on_link else result.adapters
    return answer(message, _metrics(result, wall_s), arrays=trained)


def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the adapters on the device's test data."""
    task = _read(message, context)
    with at_work(task.contact, context, task.job) as presence:
        return _evaluate(task, message, context, presence)


def _evaluate(task: TurnTask, message: Message, context: Context, presence: Presence) -> Message:
    route, model = _load(task)
    job = task.job
    data = _data(job).test(task.device)
    link, token = _dial(task, context, presence)
    started = time.perf_counter()
    result = evaluate_turn(
        model,
        route,
        batches(data, job.batch_size),
        adapters=None if task.adapters_on_link else read_arrays(message),
        seed=task.seed,
        link=link,
        token=token,
        codec=task.codec,
    )
    return answer(message, _metrics(result, time.perf_counter() - started))


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
        connect_timeout_s=job.connect_s,
        ping_s=job.ping_s,
    )


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


def _read(message: Message, context: Context) -> TurnTask:
    task: TurnTask = read_task(message, TurnTask)
    if task.device != device_index(context):
        raise FedsplitError(f"device={task.device}: this node is {device_index(context)}")
    return task


def _load(task: TurnTask) -> tuple[Route, SplitModel]:
    torch.set_num_threads(task.job.threads)
    route = Route.parse(task.route, task.n_blocks)
    return route, cached_model(task.job, route.on(DEVICE))


def _dial(
    task: TurnTask, context: Context, presence: Presence
) -> tuple[GrpcLink | None, str | None]:
    """Return the link of a turn and what opens it, once the turn begins; none if it needs none."""
    address, token = task.address, task.token
    if task.ahead:
        words = presence.wait_for_words(threading.TIMEOUT_MAX)  # or until the server is gone
        address, token = str(words["address"]), str(words["token"])
    if not address:
        return None, None
    job = task.job
    tls = LinkSettings.of_node(context.node_config).client_tls(job.security)
    return GrpcLink(address, tls=tls, connect_timeout_s=job.connect_s, ping_s=job.ping_s), token


def _key(value: ModelSpec | DataSpec) -> str:
    return json.dumps(to_mapping(value), sort_keys=True)


def _data(job: Job) -> FederatedData:
    return _load_data(_key(job.data), _key(job.model), job.n_devices, job.seed)


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
        "payload-up": result.stats.up_payload_bytes,
        "payload-down": result.stats.down_payload_bytes,
        "adapters-up": result.stats.up_adapter_bytes,
        "adapters-down": result.stats.down_adapter_bytes,
        "compute-s": result.compute_s,
        "link-s": result.link_s,
        "wall-s": wall_s,
    }
