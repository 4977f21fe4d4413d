"""SFT: how much less activations take, and how much shorter that and planning make a round."""

from collections.abc import Sequence
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
from ..plan import Scenario, build_scenario
from .common import (
    Chart,
    Figure,
    Reproduction,
    change,
    paper_config,
    paper_scenario,
    round_delays_s,
)

PAPER = "sft"
_BATCH = 32
BASELINES = ("SFL + LoRA", "SL + LoRA", "FedLoRA")


def reproduce(overrides: Sequence[str]) -> Reproduction:
    """Compare activation traffic with uncompressed traffic, and a round with the baselines'."""
    config = paper_config(PAPER, overrides)
    counted, sent = activation_ratios(config)
    table = CodecTable.read_csv(default_codec_table()).envelope()
    mild = table.ratio[table.loss_increase <= config.paper.loss_limit].min()
    author = f"strategy=sft strategy.codec_table=null codec=sft {_point(config)}".split()
    cut = f"strategy.cut={config.paper.cut}"
    scenarios = {
        BASELINES[0]: paper_scenario(PAPER, overrides, "strategy=splitfed", cut),
        BASELINES[1]: paper_scenario(PAPER, overrides, "strategy=vanilla", cut),
        BASELINES[2]: paper_scenario(PAPER, overrides, "strategy=fedlora"),
        "SFT, authors' cut": paper_scenario(PAPER, overrides, *author, cut),
        "SFT": paper_scenario(PAPER, overrides, *author),
        "SFT, gradients too": _both_ways(paper_config(PAPER, overrides, *author)),
    }
    delays = {name: round_delays_s(one, config.paper.rounds) for name, one in scenarios.items()}
    mean = {name: float(values.mean()) for name, values in delays.items()}
    limit = f"{config.paper.loss_limit:g} nats"
    both = "gradients compressed as activations are"
    return Reproduction(
        PAPER,
        (
            Figure(
                "activation traffic, authors' count of bits",
                "-93.6 %",
                "uncompressed fp32 activations",
                100 * (counted - 1),
                (-94.1, -93.1),
                100 * (sent - 1),
                "bytes really sent: positions entropy-coded, tokens scaled, no clipping",
            ),
            Figure(
                f"activation traffic at most {limit} worse, shipped language model",
                "none",
                "uncompressed fp32 activations",
                100 * (float(mild) - 1),
            ),
            Figure(
                "delay of a round",
                "-80.2 % (arXiv v1), -66.4 % (JSTSP)",
                "SFL + LoRA: cut fixed, equal bands, uncompressed",
                change(mean["SFT"], mean[BASELINES[0]]),
                (-100.0, -66.4),
                change(mean["SFT, gradients too"], mean[BASELINES[0]]),
                both,
            ),
            Figure(
                "delay of a round",
                "-80.2 % (arXiv v1), -66.4 % (JSTSP)",
                "SL + LoRA: cut fixed, one device after the other",
                change(mean["SFT"], mean[BASELINES[1]]),
                (-100.0, -66.4),
                change(mean["SFT, gradients too"], mean[BASELINES[1]]),
                both,
            ),
            Figure(
                "delay of a round at the authors' cut",
                "none",
                "SFL + LoRA: cut fixed, equal bands, uncompressed",
                change(mean["SFT, authors' cut"], mean[BASELINES[0]]),
            ),
            Figure(
                "delay of a round",
                "none",
                "FedLoRA: no split" + _too_large(scenarios[BASELINES[2]]),
                change(mean["SFT"], mean[BASELINES[2]]),
                None,
                change(mean["SFT, gradients too"], mean[BASELINES[2]]),
                both,
            ),
        ),
        (Chart("Delay of a round", "", "s", tuple(mean), {"": list(mean.values())}),),
        (
            "Traffic is of real activations: texts of the Python reference through the shipped "
            f"language model, cut {config.paper.activations_cut}. This operating point costs that "
            "small model more loss than the limit (second row: the most that keeps it). What it "
            "costs an image classifier's accuracy is measured with --train, not here.",
        ),
        config.paper.provenance,
    )


def activation_ratios(config: DictConfig) -> tuple[float, float]:
    """Return bits over raw bits on real activations: as the authors count, and as sent here."""
    keep, bits = config.paper.keep, config.paper.bits
    raw = counted = sent = 0
    ours = make_codec(fedsplit_point(keep, bits), config.seed)
    for tensor in shipped_activations(config.paper.activations_cut, config.seed):
        theirs = TopK(keep=keep, bits=bits, rounding="author", clip_percentile=95)
        symbols = theirs.quantise(tensor).symbols
        counted += author_bits(np.bincount(symbols >> 1), tensor.numel())
        sent += 8 * len(ours.encode(tensor, range(len(tensor))))
        raw += 8 * tensor.nbytes
    return counted / raw, sent / raw


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


def _point(config: DictConfig) -> str:
    return f"codec.uplink.keep={config.paper.keep} codec.uplink.bits={config.paper.bits}"


def _both_ways(config: DictConfig) -> Scenario:
    config.codec.downlink = config.codec.uplink
    return build_scenario(config)


def _too_large(scenario: Scenario) -> str:
    """Return a remark if the whole model does not fit some devices."""
    crowded = scenario.row(1).devices_over_memory
    n_devices = scenario.system.fleet.n_devices
    return f" (does not fit {crowded} of {n_devices} devices)" if crowded else ""
