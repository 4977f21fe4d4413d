"""Narrow twins: the same architecture with the same blocks, but only a few numbers wide.

A twin runs in milliseconds, so that what a cut does to a model can be tried out before any real
weights are read.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 128
WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "num_attention_heads": 4,
    "n_head": 4,
    "intermediate_size": 64,
    "n_inner": 64,
    "ffn_dim": 64,
    "head_dim": 8,
}


def narrow(config: PretrainedConfig) -> PretrainedConfig:
    """Return a configuration with the architecture and depth of `config` and narrow layers."""
    return type(config).from_dict(_narrowed(config.to_dict()))


def _narrowed(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: WIDTHS.get(name, value) if value is not None else None
        for name, value in fields.items()
    }


def tiny_config(model_type: str, n_blocks: int) -> PretrainedConfig:
    """Return a narrow configuration of `model_type` with `n_blocks` blocks."""
    return narrow(CONFIG_MAPPING[model_type](num_hidden_layers=n_blocks))


def example_inputs(config: PretrainedConfig, task: str, seed: int = 0) -> dict[str, Tensor]:
    """Return a small batch for a model of `config`, its last row padded, with labels."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }
