"""Frozen weights in 8 or 4 bits: gradients of the unsplit quantised model, in less memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb

from fedsplit.errors import SettingsError
from fedsplit.models import ModelSpec, load
from fedsplit.models.quantise import give_back
from fedsplit.models.routes import compare, gradients
from fedsplit.models.spec import usable_config
from fedsplit.models.tiny import example_inputs, tiny_config
from fedsplit.plan import Route, Segment

BLOCKS = 3
ROUTES = (
    Route.two_tier(BLOCKS, 1),
    Route.three_tier(BLOCKS, 1, 2),
    Route.u_shaped(BLOCKS, 1, 2),
)
KINDS = ("int8", "nf4")


def config_of(model_type: str) -> PretrainedConfig:
    config = usable_config(tiny_config(model_type, BLOCKS), "causal-lm")
    config.tie_word_embeddings = True
    return config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_gradients_are_those_of_the_unsplit_quantised_model(model_type: str, kind: str) -> None:
    config = config_of(model_type)
    spec = ModelSpec(model_type=model_type, quantize=kind, lora={"use_dora": kind == "nf4"})
    inputs = example_inputs(config, "causal-lm")
    expected = gradients(spec, config, Route.device_only(BLOCKS), inputs)
    plain = gradients(replace(spec, quantize=None), config, Route.device_only(BLOCKS), inputs)
    assert compare(expected, plain) is not None
    for route in ROUTES:
        assert compare(expected, gradients(spec, config, route, inputs)) is None, str(route)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_that_the_library_itself_makes(
    tmp_path: Path, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made piece by piece, here of 64 rows each."""
    monkeypatch.setattr("fedsplit.models.quantise._CHUNK_BYTES", 1)
    config = tiny_config("llama", BLOCKS)
    config.hidden_size, config.head_dim, config.vocab_size = 64, 16, 200
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.save_pretrained(tmp_path)
    model = load(ModelSpec(source=str(tmp_path), quantize=kind)).model
    for name in ("model.layers.1.mlp.down_proj", "model.embed_tokens"):
        weight: Tensor = plain.get_submodule(name).weight.detach()  # type: ignore[assignment]
        own = model.get_submodule(name).weight
        if kind == "int8":
            whole = bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
            assert torch.equal(own, whole.data)
            assert torch.equal(own.SCB, whole.SCB)
        else:
            data, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
            assert torch.equal(own, data)
            assert torch.equal(own.quant_state.absmax, state.absmax)
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize(("kind", "ratio"), [("int8", 1.05), ("nf4", 0.6)])
def test_a_segment_holds_near_its_size_over_the_ratio(
    tmp_path: Path, kind: str, ratio: float
) -> None:
    """Of a tied embedding, the device holds no copy for a head that is elsewhere."""
    config = tiny_config("llama", BLOCKS)
    config.hidden_size, config.head_dim, config.intermediate_size = 256, 64, 512
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    device = Segment("device", 0, 2)
    spec = ModelSpec(source=str(tmp_path), r=1)
    held = {kind: load(replace(spec, quantize=kind), [device]).held_bytes for kind in (kind, None)}
    assert held[kind] < ratio / 2 * held[None] + 20_000


def test_a_tensor_that_is_given_back_keeps_what_lies_beside_it() -> None:
    memory = torch.ones(3 << 20)
    give_back(memory[1 << 20 : 2 << 20])
    assert memory[: 1 << 20].eq(1).all()
    assert memory[2 << 20 :].eq(1).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"quantize": "int8", "lora": {"use_dora": True}},
            "lora.use_dora=True: must be false with quantize=int8",
        ),
        ({"quantize": "int4"}, "quantize='int4': must be one of None, int8, nf4"),
        ({"quantize": "nf4", "train": "full"}, "quantize='nf4': must be absent with train=full"),
        (
            {"quantize": "nf4", "lora": {"init_lora_weights": "pissa"}},
            "lora.init_lora_weights='pissa': must be one that leaves quantised weights alone",
        ),
    ],
)
def test_wrong_settings(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ModelSpec(model_type="llama", **fields)  # type: ignore[arg-type]
