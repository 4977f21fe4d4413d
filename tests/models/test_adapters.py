"""Adapters lie where their module runs, in float32, and train as the unsplit PEFT model's do."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks._ways import plain_gradients
from fedsplit.errors import FedsplitError
from fedsplit.models import ModelSpec, load
from fedsplit.models.lora import lora_config
from fedsplit.models.routes import compare, gradients
from fedsplit.models.spec import usable_config
from fedsplit.models.tiny import example_inputs, tiny_config
from fedsplit.models.weights import weights_dtype
from fedsplit.plan import Route, Segment
from fedsplit.report.export import save_adapter

BLOCKS = 3
ROUTES = (
    *(Route.two_tier(BLOCKS, cut) for cut in range(BLOCKS)),
    Route.three_tier(BLOCKS, 1, 2),
    Route.u_shaped(BLOCKS, 1, 2),
)
EMBEDDINGS = {"gpt2": "wte", "llama": "embed_tokens", "gemma3_text": "embed_tokens"}


@pytest.mark.parametrize("model_type", EMBEDDINGS)
@pytest.mark.parametrize("where", ["head", "embeddings", "both", "head and blocks"])
def test_tied_weights_may_have_adapters_at_either_end(model_type: str, where: str) -> None:
    """The weight is shared, the adapters are not: each lives where its module is called."""
    config = usable_config(tiny_config(model_type, BLOCKS), "causal-lm")
    config.tie_word_embeddings = True
    embeddings = EMBEDDINGS[model_type]
    block = "c_attn" if model_type == "gpt2" else "v_proj"
    targets = {
        "head": ("lm_head",),
        "embeddings": (embeddings,),
        "both": (embeddings, "lm_head"),
        "head and blocks": ("lm_head", block),
    }[where]
    spec = ModelSpec(model_type=model_type, target_modules=targets)
    inputs = example_inputs(config, "causal-lm")
    expected = plain_gradients(spec, config, inputs)
    assert any(("lm_head" if "head" in where else embeddings) in name for name in expected)
    for route in ROUTES:
        assert compare(expected, gradients(spec, config, route, inputs)) is None, str(route)


def test_an_adapter_of_a_tied_head_takes_memory_with_the_head_only(tmp_path: Path) -> None:
    config = tiny_config("gpt2", BLOCKS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    spec = ModelSpec(source=str(tmp_path), target_modules=("lm_head", "wte"))
    first, last = Route.two_tier(BLOCKS, 1).segments
    assert all("wte" in name for name in load(spec, [first]).adapter_names(first))
    assert all("lm_head" in name for name in load(spec, [last]).adapter_names(last))


def test_plain_peft_loads_adapters_of_tied_weights(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny_config("gpt2", BLOCKS)).save_pretrained(tmp_path / "base")
    spec = ModelSpec(source=str(tmp_path / "base"), target_modules=("lm_head", "wte"))
    model = load(spec)
    whole = Segment("device", 0, BLOCKS)
    values = {name: torch.randn(value.shape) for name, value in model.adapters(whole).items()}
    model.install({name: torch.nn.Parameter(value) for name, value in values.items()})
    save_adapter(tmp_path / "adapter", values, lora_config(spec), str(spec.source))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = example_inputs(model.config, "causal-lm")
    with torch.no_grad():
        assert torch.equal(model.run(whole, inputs).logits, plain(**inputs).logits)  # type: ignore[arg-type]


def test_training_whole_a_model_with_tied_weights_gives_no_advice_that_costs_the_head() -> None:
    config = usable_config(tiny_config("gpt2", BLOCKS), "causal-lm")
    spec = ModelSpec(model_type="gpt2", train="full")
    with pytest.raises(FedsplitError, match="U-shaped") as caught:
        gradients(spec, config, Route.two_tier(BLOCKS, 1), example_inputs(config, spec.task))
    assert "tie_word_embeddings" not in str(caught.value)


HALF = ("gpt2", "llama", "gemma3_text", "opt", "mixtral", "mamba", "falcon")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", HALF)
def test_gradients_in_half_precision_are_the_unsplit_model_s(model_type: str, dtype: str) -> None:
    """To the last bit; what is trained is in float32 all the same."""
    config = usable_config(tiny_config(model_type, BLOCKS), "causal-lm")
    targets = ("in_proj", "x_proj") if model_type == "mamba" else None
    spec = ModelSpec(model_type=model_type, dtype=dtype, target_modules=targets)
    inputs = example_inputs(config, "causal-lm")
    expected = plain_gradients(spec, config, inputs)
    assert {value.dtype for value in expected.values() if value is not None} == {torch.float32}
    for route in ROUTES[1:]:
        assert compare(expected, gradients(spec, config, route, inputs)) is None, str(route)


def test_boundaries_are_in_the_type_of_the_weights() -> None:
    config = tiny_config("llama", BLOCKS).to_diff_dict()
    fields = {name: value for name, value in config.items() if name != "model_type"}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        model = load(ModelSpec(model_type="llama", config=fields, dtype=name))
        sent = model.run(Segment("device", 0, 1), example_inputs(model.config, "causal-lm"))
        assert {tensor.dtype for tensor in sent.tensors} == {dtype}  # type: ignore[union-attr]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("said", [True, False])
def test_auto_is_the_checkpoint_s_own_type(tmp_path: Path, stored: torch.dtype, said: bool) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama", 2), dtype=stored)
    model.save_pretrained(tmp_path)
    if not said:
        file = tmp_path / "config.json"
        lines = file.read_text().splitlines()
        file.write_text("\n".join(line for line in lines if '"dtype"' not in line))
    spec = ModelSpec(source=str(tmp_path))
    held = load(spec).model.state_dict()
    assert {v.dtype for name, v in held.items() if "lora" not in name} == {stored}
    assert {v.dtype for name, v in held.items() if "lora" in name} == {torch.float32}
    whole = ModelSpec(source=str(tmp_path), train="full")
    assert weights_dtype(whole, whole.load_config()) == torch.float32


def test_the_configuration_s_word_counts_before_what_is_stored() -> None:
    """As in transformers: the shipped checkpoint is stored in float16, to be used in float32."""
    from fedsplit.assets import default_checkpoint

    spec = ModelSpec(source=str(default_checkpoint()))
    assert weights_dtype(spec, spec.load_config()) == torch.float32
    plain = AutoModelForCausalLM.from_pretrained(default_checkpoint(), dtype="auto")
    assert plain.dtype == torch.float32
