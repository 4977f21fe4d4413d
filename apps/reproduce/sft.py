"""SFT: how much less activations take, and how much shorter that and planning make a round."""

from functools import cache

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import AutoTokenizer

from fedsplit.assets import default_codec_table
from fedsplit.codec import make_codec
from fedsplit.codec.formula import author_bits
from fedsplit.codec.topk import TopK
from fedsplit.data import batches, load_data
from fedsplit.models import Boundary, load
from fedsplit.plan import Route
from fedsplit.planning import CodecTable

from ..config import data_spec, job, load_config
from .study import Case

_BATCH = 32


def add(case: Case) -> dict[str, object]:
    """Cost all members, and add what is left of activations' bits."""
    case.cost()
    delay = case.values["delay_s"]
    delay["equal bands, best cut"] = delay["equal bands by cut"].min()
    table = CodecTable.read_csv(default_codec_table())
    harmless = table.loss_increase <= case.config.paper.loss_limit
    whole = harmless & np.array([settings["name"] == "int8" for settings in table.settings])
    counted, sent, every = activation_ratios(case.config)
    ratios = {
        "uncompressed": 1.0,
        "authors' count": counted,
        "as sent": sent,
        "every value": every,
        "harmless": table.ratio[harmless].min(),
        "harmless int8": table.ratio[whole].min(),
    }
    case.values["traffic"] = {name: np.array(ratio) for name, ratio in ratios.items()}
    return {}


def activation_ratios(config: DictConfig) -> tuple[float, float, float]:
    """Return bits over raw bits on real activations.

    As the authors count, as sent here, and as sent if no value is left out.
    """
    keep, bits = config.paper.keep, config.paper.bits
    raw = counted = sent = whole = 0
    ours = make_codec(fedsplit_point(keep, bits), config.seed)
    every_value = make_codec(fedsplit_point(1.0, bits), config.seed)
    for tensor in shipped_activations(config.paper.activations_cut, config.seed):
        theirs = TopK(keep=keep, bits=bits, rounding="author", clip_percentile=95)
        symbols = theirs.quantise(tensor).symbols
        counted += author_bits(np.bincount(symbols >> 1), tensor.numel())
        sent += 8 * len(ours.encode(tensor, range(len(tensor))))
        whole += 8 * len(every_value.encode(tensor, range(len(tensor))))
        raw += 8 * tensor.nbytes
    return counted / raw, sent / raw, whole / raw


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
        boundary = model.run(Route.two_tier(model.n_blocks, cut).segments[0], batch.inputs)
    assert isinstance(boundary, Boundary)
    return boundary.tensors
