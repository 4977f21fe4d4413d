"""Classifiers of texts train split as unsplit, and find the last token without the token ids."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks._ways import plain_gradients
from fedsplit.errors import FedsplitError
from fedsplit.models import ModelSpec, load
from fedsplit.models.lora import lora_config
from fedsplit.models.names import SEQUENCES
from fedsplit.models.routes import compare, gradients
from fedsplit.models.spec import usable_config
from fedsplit.models.tiny import example_inputs, tiny_config
from fedsplit.plan import Route, Segment
from fedsplit.report.export import save_adapter

BLOCKS = 3
WHOLE = Segment("device", 0, BLOCKS)
ROUTES = (
    Route.two_tier(BLOCKS, 0),
    Route.three_tier(BLOCKS, 1, 2),
    Route.u_shaped(BLOCKS, 1, 2),
)


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3", "opt", "bert", "roberta"])
def test_gradients_are_those_of_plain_peft(model_type: str, train: str) -> None:
    """Of a padded batch: GPT and Llama judge a text by its last token, BERT by its first."""
    config = tiny_config(model_type, BLOCKS)
    config.num_labels = 3
    config = usable_config(config, SEQUENCES)
    spec = ModelSpec(model_type=model_type, task=SEQUENCES, train=train)
    inputs = example_inputs(config, SEQUENCES)
    assert not inputs["attention_mask"].all()
    expected = plain_gradients(spec, config, inputs)
    assert any("score" in name or "classifier" in name for name in expected)
    for route in ROUTES:
        assert compare(expected, gradients(spec, config, route, inputs)) is None, str(route)


def test_plain_peft_loads_what_was_trained_on_a_language_model(tmp_path: Path) -> None:
    """With its head, which a language model's checkpoint has none of."""
    AutoModelForCausalLM.from_config(tiny_config("llama", BLOCKS)).save_pretrained(
        tmp_path / "base"
    )
    fields = {"num_labels": 3}
    spec = ModelSpec(source=str(tmp_path / "base"), task=SEQUENCES, config=fields)
    model = load(spec)
    parts = [load(spec, [segment]).adapters(segment) for segment in ROUTES[1].segments]
    joined = {name: value for part in parts for name, value in part.items()}
    assert compare(model.adapters(WHOLE), joined) is None
    draw = torch.Generator().manual_seed(0)
    trained = {n: v + 0.1 * torch.randn(v.shape, generator=draw) for n, v in joined.items()}
    model.install({name: torch.nn.Parameter(value) for name, value in trained.items()})
    save_adapter(tmp_path / "it", trained, lora_config(spec, model.model), str(spec.source))
    base = AutoModelForSequenceClassification.from_pretrained(
        spec.source, num_labels=3, pad_token_id=model.config.pad_token_id
    )
    plain = PeftModel.from_pretrained(base, tmp_path / "it").eval()
    inputs = example_inputs(model.config, SEQUENCES)
    with torch.no_grad():
        ours = model.run(WHOLE, inputs).logits  # type: ignore[union-attr]
        torch.testing.assert_close(ours, plain(**inputs).logits)


def test_models_of_an_encoder_and_a_decoder_are_refused() -> None:
    with pytest.raises(FedsplitError, match="must be a decoder or an encoder, not both"):
        ModelSpec(model_type="t5", task=SEQUENCES).load_config()
    with pytest.raises(FedsplitError, match="has no causal-lm model"):
        ModelSpec(model_type="t5").load_config()
