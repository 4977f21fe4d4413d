"""SFT: how much less activations take, and how much shorter that and planning make a round."""

from collections.abc import Iterable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from fedsplit.assets import default_codec_table
from fedsplit.codec import Loopback
from fedsplit.codec.formula import author_bits
from fedsplit.codec.topk import TopK
from fedsplit.data import batches, load_data
from fedsplit.models import load
from fedsplit.plan import Route
from fedsplit.planning import CodecTable

from ..coded import first_part
from ..config import data_spec, job, load_config
from .study import Case

_BATCH = 32


def add(case: Case) -> None:
    """Cost all members, and add what is left of activations' bits."""
    delay = case.cost()["delay_s"]
    case.add("delay_s", "equal bands, best cut", delay["equal bands by cut"].min())
    table = CodecTable.read_csv(default_codec_table())
    harmless = table.loss_increase <= case.config.paper.loss_limit
    whole = harmless & np.array([settings["name"] == "int8" for settings in table.settings])
    paper, seed = case.config.paper, case.config.seed
    tensors = shipped_activations(paper.activations_cut, seed)
    for name, ratio in {
        "uncompressed": 1.0,
        "authors' count": authors_ratio(tensors, paper.keep, paper.bits),
        "as sent": sent_ratio(tensors, fedsplit_point(paper.keep, paper.bits), seed),
        "every value": sent_ratio(tensors, fedsplit_point(1.0, paper.bits), seed),
        "harmless": table.ratio[harmless].min(),
        "harmless int8": table.ratio[whole].min(),
    }.items():
        case.add("traffic", name, ratio)


def authors_ratio(tensors: Iterable[Tensor], keep: float, bits: int) -> float:
    """Return bits over raw bits as the authors count them."""
    counted = raw = 0
    for tensor in tensors:
        theirs = TopK(keep=keep, bits=bits, rounding="author", clip_percentile=95)
        counted += author_bits(np.bincount(theirs.quantise(tensor).symbols >> 1), tensor.numel())
        raw += 8 * tensor.nbytes
    return counted / raw


def sent_ratio(tensors: Iterable[Tensor], settings: Mapping[str, object], seed: int) -> float:
    """Return bytes sent over raw bytes."""
    way = Loopback(settings, seed)
    for tensor in tensors:
        way.send(tensor, range(len(tensor)))
    return way.n_bytes / way.n_raw_bytes


def fedsplit_point(keep: float, bits: int) -> dict[str, object]:
    """Return fedsplit's codec at the paper's operating point."""
    return {"name": "topk", "keep": keep, "bits": bits, "rounding": "nearest", "scale": "token"}


@cache
def shipped_activations(cut: int, seed: int) -> tuple[Tensor, ...]:
    """Return what the shipped language model sends for a batch of unseen texts."""
    config = load_config([f"seed={seed}"])
    work = job(config)
    model = load(work.model)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(work.model.source)
    samples = load_data(data_spec(config), tokenizer, 1, seed).test(0)
    batch = next(iter(batches(samples, _BATCH)))
    with torch.no_grad():
        return first_part(model, Route.two_tier(model.n_blocks, cut), batch.inputs).tensors
