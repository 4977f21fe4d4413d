"""What is wrong with a run, found before anything is started or written."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import AutoTokenizer, PretrainedConfig

from fedsplit.codec import make_codec
from fedsplit.data import (
    DataSpec,
    Samples,
    TokenSamples,
    first_sample,
    load_data,
    load_device,
    load_test,
    prompt_tokens,
)
from fedsplit.data.partition import LOCAL
from fedsplit.data.spec import LABEL
from fedsplit.errors import FedsplitError, SettingsError, require, require_known
from fedsplit.flower import Job, LinkSettings
from fedsplit.flower.instructions import require_takes_late, require_takes_one
from fedsplit.flower.server.checkpoint import load_checkpoint
from fedsplit.models import ModelSpec, read_tokenizer
from fedsplit.models.names import IMAGES, SEQUENCES
from fedsplit.models.routes import keeps_apart
from fedsplit.privacy import PrivacySpec, epsilon
from fedsplit.report import is_finished, read_records
from fedsplit.report.best import why_stop

from .aggregator import build_aggregator, require_enough_devices, require_enough_updates
from .config import codec_plan, data_spec, job, n_devices
from .link_config import link_settings, server_limits
from .outputs import KeepSettings, evaluate_settings, keep_settings, stop_settings
from .run_settings import run_settings
from .scenario import build_system, check_first_round, require_frozen
from .server_app import build_scheme
from .values import plain
from .work import aggregation


def check(config: DictConfig, folder: Path) -> str | None:
    """Find what is wrong with a configuration before anything is started.

    Returns
    -------
    str or None
        The first training sample, if only a part of samples is learnt (`first_sample`).

    Raises
    ------
    FedsplitError
        Naming the field.
    """
    settings = run_settings(config)
    work = job(config)
    devices = work.n_devices
    quorum = settings.quorum
    for field, most in (("quorum", quorum), ("quorum_devices", settings.quorum_devices or 1)):
        require(most <= devices, f"run.{field}", most, f"at most fleet.devices={devices}")
    require_accelerator(settings.accelerator, on_this_machine=config.link.bind is None)
    link = link_settings(config)
    require_link_files(link)
    require(link.login is None, "link.login", link.login, "null, simulated nodes log in nowhere")
    require_codecs(config)
    keep = keep_settings(config)
    plain_model = work.model.bottleneck is None
    require(plain_model or keep == KeepSettings(), "keep", str(keep), "off with a bottleneck")
    require_folder(folder)
    aggregator = build_aggregator(plain(config.aggregator))
    require_enough_devices(aggregator, devices)
    require_takes_one(aggregator, aggregation(config))
    require_takes_late(aggregator, settings.waiting, aggregation(config))
    data = data_spec(config)
    require_budget(work.privacy)
    require_model(work.model, data)
    sample = require_data(work, data)
    with blaming_the_configuration(work.model):
        system = build_system(config)
    edges = system.fleet.n_edges
    require(edges > 0 or not settings.edge_nodes, "run.edge_nodes", True, "false without edges")
    forgetful = settings.edge_nodes and work.optimizer.keep_state
    require(not forgetful, "train.keep_state", True, "false with run.edge_nodes, which forget")
    noisy = max(work.privacy.noise_multiplier, work.privacy.gradient_noise_multiplier) > 0
    uncounted = work.optimizer.keep_order and noisy
    require(not uncounted, "train.keep_order", True, "false with noise: it counts whole epochs")
    plan = check_first_round(build_scheme(config), system, settings.waiting)
    require_frozen(config, plan)
    require_enough_updates(aggregator, plan)
    require_own_tests(config, work, data)
    if config.resume is not None:
        reached = load_checkpoint(folder).server_round
        records = [record for record in read_records(folder) if record.round <= reached]
        stop, by = stop_settings(config), evaluate_settings(config).best_by
        why = why_stop(records, by, stop.patience, stop.min_delta)
        require(why is None, "stop.patience", stop.patience, f"larger to go on: {why}")
        least = reached + 1 if is_finished(folder) else reached
        require(config.rounds >= least, "rounds", config.rounds, f"above {reached}, already done")
    return sample


def require_budget(spec: PrivacySpec) -> None:
    """Refuse a budget that a single use of a sample would overspend, and noise without account."""
    if spec.noise_multiplier > 0:
        least = epsilon(spec, 1)
        enough = spec.budget is None or spec.budget >= least
        require(enough, "privacy.budget", spec.budget, f"at least {least:.3g}, what one use spends")


def require_accelerator(name: str, on_this_machine: bool) -> None:
    """Refuse what torch does not know as a device, or this machine does not have."""
    allowed = "auto, cpu, or a torch device that there is, such as cuda:0"
    if name == "auto":
        return
    try:
        device = torch.device(name)
        if on_this_machine:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingsError("run.accelerator", name, allowed) from error
    require(device.type != "meta", "run.accelerator", name, allowed)


def require_link_files(link: LinkSettings) -> None:
    """Refuse certificates that cannot be read."""
    for name in ("certificate", "key", "root"):
        path = getattr(link, name)
        if path is not None:
            readable = Path(path).is_file() and os.access(path, os.R_OK)
            require(readable, f"link.{name}", path, "a PEM file that can be read")


def require_codecs(config: DictConfig) -> None:
    """Refuse unknown codecs and settings, and memories that have no place."""
    plan = codec_plan(config)
    held, devices = server_limits(config).held_bytes, n_devices(config)
    # A route that comes home has two streams each way.
    room = held // (devices * (2 if config.strategy.get("tail") else 1))
    for way, settings in (("uplink", plan.uplink), ("downlink", plan.downlink)):
        try:
            codec = make_codec(settings, 0)
        except FedsplitError as error:
            raise FedsplitError(str(error).replace("codec.", f"codec.{way}.", 1)) from error
        if codec.lasting is None:
            continue
        nodes = config.run.edge_nodes
        require(
            not nodes, f"codec.{way}.over_turns", True, "false with run.edge_nodes, which forget"
        )
        room -= codec.lasting.limit_bytes
        least = f"less, both ways and all devices within link.held_bytes={held}"
        require(room >= 0, f"codec.{way}.memory_mb", codec.lasting.limit_bytes / 1e6, least)


def require_folder(folder: Path, field: str = "output") -> None:
    """Refuse a folder that cannot be made or written to; make none."""
    there = folder
    while not os.path.lexists(there):
        there = there.parent
    usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    require(usable, field, str(folder), f"a folder that can be written to ({there} is none)")


def require_model(spec: ModelSpec, data: DataSpec) -> None:
    """Refuse unknown fields of the model's configuration, and data that it cannot take."""
    require_fields(spec)
    with blaming_the_configuration(spec):
        config = spec.load_config()
    images = data.source == "digits" or data.image_column is not None
    kind = "images" if spec.task == IMAGES else "texts"
    right = images == (spec.task == IMAGES)
    require(right, "data.source", data.source, f"{kind} for model.task={spec.task}")
    labelled = data.loss_on == LABEL
    fits = labelled == (spec.task == SEQUENCES)
    wanted = f"{LABEL} for model.task={SEQUENCES}, and only then"
    require(fits, "data.loss_on", data.loss_on, f"{wanted}; it is {spec.task}")
    apart = not data.packing or keeps_apart(spec)
    allowed = f"false, {config.model_type!r} does not keep texts of a row apart"
    require(apart, "data.packing", True, allowed)
    pixels = getattr(config, "image_size", None)
    if images and isinstance(pixels, int):
        size = data.image_size
        require(size == pixels, "data.image_size", size, f"{pixels}, as the model takes it")


@contextmanager
def blaming_the_configuration(spec: ModelSpec) -> Iterator[None]:
    """Turn what transformers and torch raise over fields of ``model.config`` into a refusal.

    Without any such field it is not the user's, and stays what it is.

    Raises
    ------
    FedsplitError
        Naming ``model.config``.
    """
    try:
        yield
    except FedsplitError as error:
        named = re.match(
            r"(source|model_type|target_modules|adapter|quantize|lora[\w.]*)=", str(error)
        )
        if named is None:
            raise
        raise FedsplitError(f"model.{error}") from error
    except Exception as error:
        if not spec.config:
            raise
        allowed = f"what a model can be made of ({error})"
        raise SettingsError("model.config", dict(spec.config), allowed) from error


def require_fields(spec: ModelSpec) -> None:
    """Refuse settings in ``model.config`` that the model's configuration does not have."""
    plain = ModelSpec(source=spec.source, model_type=spec.model_type, task=spec.task)
    with blaming_the_configuration(plain):
        config = plain.load_config()
    _require_fields(spec.config, config, "model.config")


def _require_fields(values: Mapping[str, Any], config: PretrainedConfig, where: str) -> None:
    known = {*config.to_dict(), *config.attribute_map, *vars(config), "num_labels"}
    for name, value in values.items():
        field = f"{where}.{name}"
        require_known(field, value, sorted(key for key in known if not key.startswith("_")))
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            require(isinstance(value, Mapping), field, value, "a mapping")
            _require_fields(value, part, field)


def require_data(work: Job, data: DataSpec) -> str | None:
    """Refuse data that is not there, cannot be read, or does not suffice for all devices.

    Returns the first sample, if only a part of samples is learnt.
    """
    tokenizer = None
    if work.model.task != IMAGES and work.model.source is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(work.model.source)
        except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
            allowed = f"a model whose tokenizer can be read ({error})"
            raise SettingsError("model.source", work.model.source, allowed) from error
    try:
        in_parts = data.source == "chat" or data.prompt_column is not None
        if data.partition == LOCAL:
            samples = require_own_data(work, data, tokenizer)
        else:
            held = load_data(data, tokenizer, work.n_devices, work.seed)
            require_classes(work.model, held.n_labels)
            # Made only to be shown: where all is learnt there is nothing to mark.
            samples = held.train(0) if in_parts else None
        if in_parts and tokenizer is not None and isinstance(samples, TokenSamples):
            return first_sample(samples, tokenizer)
    except SettingsError as error:
        field = {"n_devices": "fleet.devices"}.get(error.field, error.field)
        raise SettingsError(field, error.value, error.allowed) from error
    except (OSError, UnicodeError, ImportError) as error:
        where = "data.path" if data.path is not None else "data.source"
        given = data.path or data.source
        raise SettingsError(where, given, f"data that can be read ({error})") from error
    return None


def require_own_tests(config: DictConfig, work: Job, data: DataSpec) -> None:
    """Refuse a test set of the server's that cannot be read, and what a model cannot write."""
    settings, source = evaluate_settings(config), work.model.source
    given = list(settings.prompts)
    writes = work.model.task == "causal-lm" and source is not None
    require(writes or not given, "evaluate.prompts", given, "[] but for a language model")
    reads = work.model.task != IMAGES and source is not None
    tokenizer = read_tokenizer(str(source)) if reads else None
    if tokenizer is not None:
        for prompt in settings.prompts:
            prompt_tokens(tokenizer, data, prompt)
    if settings.central is None:
        return
    try:
        load_test(data, tokenizer, settings.central)
    except SettingsError as error:
        field = "evaluate.central" if error.field == "data.path" else error.field
        raise SettingsError(field, error.value, error.allowed) from error
    except (OSError, UnicodeError, ImportError) as error:
        allowed = f"a test set that can be read ({error})"
        raise SettingsError("evaluate.central", settings.central, allowed) from error


def require_classes(spec: ModelSpec, n_labels: int | None) -> None:
    """Refuse a model with fewer classes than the data."""
    has = int(spec.load_config().num_labels or 0)
    enough = n_labels is None or has >= n_labels
    require(enough, "model.config.num_labels", has, f"at least {n_labels}, the data's classes")


def require_own_data(work: Job, data: DataSpec, tokenizer: Any) -> Samples | None:
    """Refuse own data of simulated devices that cannot be read; nodes elsewhere have theirs.

    Returns the first device's training samples.
    """
    first = None
    for device, path in enumerate(work.data_paths or ()):
        held = load_device(
            data,
            tokenizer,
            device=device,
            n_devices=work.n_devices,
            seed=work.seed,
            path=path,
        )
        first = held.train if first is None else first
    return first
