"""Models that a node's process keeps between messages."""

import json
from functools import lru_cache

from fedsplit.execution import compute
from fedsplit.execution.accelerator import torch_device
from fedsplit.flower.tasks import Job
from fedsplit.mapping import from_mapping, to_mapping
from fedsplit.models import ModelSpec, SplitModel, load
from fedsplit.plan import Segment


def cached_model(job: Job, segments: tuple[Segment, ...]) -> SplitModel:
    """Return the job's model with `segments`; a process that plays several nodes loads it once."""
    spec = json.dumps(to_mapping(job.model), sort_keys=True)
    model = _load(spec, segments, job.accelerator)
    model.counts_tokens = job.token_accuracy
    return model


@lru_cache(maxsize=1)
def _load(spec: str, segments: tuple[Segment, ...], accelerator: str) -> SplitModel:
    model = from_mapping(ModelSpec, json.loads(spec), "model")
    return compute(lambda: load(model, segments, torch_device(accelerator)))
