"""The model that a node's process keeps between messages."""

import threading

from fedsplit.execution import compute
from fedsplit.execution.accelerator import torch_device
from fedsplit.flower.tasks import Job
from fedsplit.models import SplitModel, load
from fedsplit.plan import Segment

_mutex = threading.Lock()
_kept: dict[tuple[str, str], tuple[SplitModel, tuple[Segment, ...]]] = {}  # one at most


def cached_model(job: Job, segments: tuple[Segment, ...]) -> SplitModel:
    """Return the job's model with `segments` at least, loaded once in a process.

    A process that plays several nodes, or whose cut moves, keeps what it has held so far: it loads
    again only for blocks that it has never held.
    """
    key = job.model_text, job.accelerator
    with _mutex:
        model, held = _kept.get(key, (None, ()))
        if model is None or not model.holds(segments):
            held = tuple(dict.fromkeys((*held, *segments)))
            del model
            _kept.clear()  # before the next takes its place
            model = compute(lambda: load(job.model, held, torch_device(job.accelerator)))
            _kept[key] = model, held
        return model
