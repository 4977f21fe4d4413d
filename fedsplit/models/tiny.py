"""Narrow twins: the same architecture with the same blocks, but only a few numbers wide.

A twin runs in milliseconds, so that what a cut does to a model can be tried out before any real
weights are read.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from fedsplit.errors import FedsplitError
from fedsplit.models.names import IMAGES, SEQUENCES

VOCABULARY = 128
HIDDEN, HEADS, HEAD, INNER, EXPERTS = 32, 4, 8, 64, 4
TOKENS, IMAGE = 8, 32

_HIDDEN = """hidden_size n_embd d_model word_embed_proj_dim embedding_size input_embedding_size
    output_embedding_size emb_dim embedding_dim lru_width attention_hidden_size
    pronunciation_embed_dim shape_embed_dim"""
_HEADS = """num_attention_heads n_head n_heads num_heads decoder_attention_heads
    encoder_attention_heads attention_heads num_encoder_attention_heads
    num_decoder_attention_heads num_query_groups swa_num_attention_heads index_n_heads
    linear_num_value_heads linear_num_heads n_mamba_heads"""
_HEAD = """head_dim kv_channels d_head dim_head attention_head_size qk_rope_head_dim
    qk_nope_head_dim v_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim
    linear_head_dim index_head_dim global_head_dim"""
_INNER = """intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff
    ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size feed_forward_size d_inner
    shared_intermediate_size intermediate_size_mlp expert_ffn_hidden_size dense_intermediate_size
    moe_shared_expert_intermediate_size shared_experts_intermediate_size mlp_dim d_ff"""
_EXPERTS = """num_local_experts num_experts n_routed_experts moe_num_experts"""

WIDTHS: dict[str, int] = {
    **dict.fromkeys(_HIDDEN.split(), HIDDEN),
    **dict.fromkeys(_HEADS.split(), HEADS),
    **dict.fromkeys(_HEAD.split(), HEAD),
    **dict.fromkeys(_INNER.split(), INNER),
    **dict.fromkeys(_EXPERTS.split(), EXPERTS),
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "encoder_hash_byte_group_vocab": VOCABULARY,
    "hidden_size_per_layer_input": HEAD,
    "qk_head_dim": 2 * HEAD,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "rotary_dim": 4,
    "linear_num_key_heads": 2,
    "image_size": IMAGE,
    "patch_size": IMAGE // 4,
    "hidden_sizes": HIDDEN,
    "mamba_n_heads": 2 * HEADS,
    "mamba_d_head": HEAD,
    "mamba_d_ssm": 2 * HIDDEN,
    "indexer_head_dim": HEAD,
}
"""Size of each width field of transformers' configurations in a twin."""

CAPS: dict[str, int] = {
    **dict.fromkeys(
        [
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_k",
            "moe_topk",
            "top_k_experts",
            "n_group",
            "num_expert_group",
            "n_groups",
        ],
        2,
    ),
    "topk_group": 1,
    "zero_expert_num": 2,
    "n_shared_experts": 1,
}
"""Largest value of fields that count choices, which a twin keeps small but does not raise."""

_BY_TYPE: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 2 * HEADS},
    "dots3_note_text": {"head_dim": 2 * HEAD},
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "reformer": {"axial_pos_embds": False},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD},
    "zamba2": {
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD,
        "mamba_headdim": 2 * HEAD,
    },
    "phi4_multimodal_audio": {
        "nemo_conv_channels": HIDDEN,
        "ext_pw_out_channel": HIDDEN,
        "depthwise_separable_out_channel": HIDDEN,
    },
}
"""Fields of single architectures that other fields' sizes force."""

DEPTHS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_blocks",
]

_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")
_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def narrow(config: PretrainedConfig) -> PretrainedConfig:
    """Return a configuration like `config`, of equal depth, with narrow layers and no dropout."""
    return type(config).from_dict(_narrowed(config.to_dict()))


def _narrowed(fields: Mapping[str, Any]) -> dict[str, Any]:
    heads = next((fields[name] for name in _HEADS.split() if fields.get(name)), None)
    small = {
        name: _narrow_value(name, value, heads) if isinstance(name, str) else value
        for name, value in fields.items()
    }
    return small | _BY_TYPE.get(fields.get("model_type", ""), {})


def _narrow_value(name: str, value: Any, heads: int | None) -> Any:
    if isinstance(value, Mapping):
        return _narrowed(value)
    if name.endswith(("token_id", "token_index")) and value is not None:
        return _SPECIAL_TOKENS.get(name, VOCABULARY - 1)
    if name in _KEY_VALUE_HEADS and isinstance(value, int):
        return HEADS if value == heads else 1 if value == 1 else 2
    if "drop" in name and isinstance(value, float):
        return 0.0
    if name in CAPS and isinstance(value, int):
        return min(value, CAPS[name])
    if name in WIDTHS and value is not None and not isinstance(value, str):
        small = WIDTHS[name]
        return small if isinstance(value, int) else [small for _ in value]
    return value


def tiny_config(model_type: str, n_blocks: int) -> PretrainedConfig:
    """Return a narrow configuration of `model_type` with `n_blocks` blocks."""
    cls = CONFIG_MAPPING[model_type]
    fields = cls().to_dict()
    depth = _depths(fields, n_blocks)
    if "text_config" in fields:
        inner = fields["text_config"]
        depth["text_config"] = {"model_type": inner["model_type"]} | _depths(inner, n_blocks)
    return narrow(cls(**depth))


def _depths(fields: Mapping[str, Any], n_blocks: int) -> dict[str, Any]:
    """Return the fields that give an architecture `n_blocks` blocks."""
    depth: dict[str, Any] = {name: n_blocks for name in DEPTHS if name in fields}
    return depth | _required(fields["model_type"], n_blocks)


def _required(model_type: str, n_blocks: int) -> dict[str, Any]:
    """Return what an architecture needs beyond its own defaults to be built with few blocks."""

    def alternate(first: str, second: str) -> list[str]:
        return [second if index % 2 else first for index in range(n_blocks)]

    hybrid = alternate("linear_attention", "hybrid")
    match model_type:
        case "gpt_neo":
            return {"attention_types": [[["global", "local"], n_blocks // 2]]}
        case "zamba" | "zamba2":
            return {"layers_block_type": hybrid}
        case "lfm2_moe":
            return {"layer_types": alternate("conv", "full_attention")}
        case "deepseek_v2":
            return {"num_experts_per_tok": 2}
        case "dots1":
            return {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1}
        case "hunyuan_v1_dense" | "hunyuan_v1_moe" | "ministral" | "nemotron":
            return {"head_dim": HEAD, "num_key_value_heads": 2}
        case "gemma3n_text" | "gemma4_unified_assistant":
            return {"num_kv_shared_layers": 2, "layer_types": ["full_attention"] * n_blocks}
        case "qwen4_exp_text":
            return {
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 256,
                "indexer_budget": 8,
                "indexer_compress_ratio": 2,
            }
        case "dbrx":
            return {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}}
        case "reformer":
            return {"is_decoder": True, "attn_layers": alternate("local", "lsh")}
        case "xmod":
            return {"default_language": "en_XX"}
        case "cohere_compass_text":
            return {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 10000.0}
                }
            }
        case _:
            return {}


def example_inputs(config: PretrainedConfig, task: str, seed: int = 0) -> dict[str, Tensor]:
    """Return a small batch with labels for a model of `config`; of a text, the last row padded."""
    generator = torch.Generator().manual_seed(seed)
    if task == IMAGES:
        shape = (2, config.num_channels, *image_size(config))
        return {
            "pixel_values": torch.randn(shape, generator=generator),
            "labels": torch.tensor([0, int(config.num_labels or 1) - 1]),
        }
    ids = torch.randint(3, 100, (2, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, TOKENS - 3 :] = 0
    if task == SEQUENCES:
        labels = torch.tensor([0, int(config.num_labels or 1) - 1])
        return {"input_ids": padded(ids, mask, config), "attention_mask": mask, "labels": labels}
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }


def packed_and_not(ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return `ids` as rows of two texts each, and as rows of one text each, with labels."""
    (rows, tokens), first = ids.shape, ids.shape[1] // 3
    places = torch.cat([torch.arange(first), torch.arange(tokens - first)]).expand(rows, -1)
    together = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": places,
        "labels": ids.masked_fill(places == 0, -100),
    }
    alone, mask = (torch.zeros(2 * rows, tokens, dtype=ids.dtype) for _ in range(2))
    for place, text in enumerate(part for row in ids for part in (row[:first], row[first:])):
        alone[place, : len(text)], mask[place, : len(text)] = text, 1
    labels = alone.masked_fill(mask == 0, -100)
    return together, {"input_ids": alone, "attention_mask": mask, "labels": labels}


def placeholder(
    config: PretrainedConfig, task: str, mask: Tensor | None, received: Tensor
) -> dict[str, Tensor]:
    """Return a stand-in, of the shape and place that go with `received`, for what stays behind."""
    if task == IMAGES:
        shape = (len(received), config.num_channels, *image_size(config))
        return {"pixel_values": torch.zeros((), device=received.device).expand(shape)}
    if mask is None:
        raise FedsplitError("inputs: the attention mask is needed on later tiers")
    ids = torch.zeros_like(mask)
    if task == SEQUENCES:
        ids = padded(ids + (config.get_text_config().pad_token_id == 0), mask, config)
    return {"input_ids": ids}


def padded(ids: Tensor, mask: Tensor, config: PretrainedConfig) -> Tensor:
    """Return `ids` with the model's own padding token where `mask` is 0.

    Classifiers of texts look for it to find the last token before.
    """
    return ids.masked_fill(mask == 0, config.get_text_config().pad_token_id)


def image_size(config: PretrainedConfig) -> tuple[int, int]:
    """Return the height and width of the images that a model of `config` takes."""
    size = getattr(config, "image_size", IMAGE)
    return (size, size) if isinstance(size, int) else tuple(size)
