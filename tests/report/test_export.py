"""Exports: a plain PEFT or transformers script loads them and computes the same loss."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM, LlamaConfig

from fedsplit.errors import FedsplitError
from fedsplit.models import ModelSpec, load
from fedsplit.models.adapters import lora_config
from fedsplit.plan import Segment
from fedsplit.report.export import save_adapter, save_model

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random checkpoint in a folder."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


def _loss(model) -> float:
    with torch.no_grad():
        return model(input_ids=IDS, labels=IDS).loss.item()


def _shaken(tensors):
    """Values other than the initial ones (where LoRA changes nothing)."""
    generator = torch.Generator().manual_seed(1)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "down_proj"]])
def test_peft_loads_an_adapter_and_computes_the_same_loss(base, tmp_path, targets):
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    values = _shaken(get_peft_model_state_dict(trained))
    for name, value in values.items():
        module, _, leaf = name.rpartition(".")
        trained.get_parameter(f"{module}.default.{leaf}").data = value

    save_adapter(tmp_path, values, LoraConfig(r=4, target_modules=targets), str(base))

    plain = AutoModelForCausalLM.from_pretrained(base)
    untrained_loss = _loss(plain)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert set(get_peft_model_state_dict(loaded)) == set(values)
    assert _loss(loaded) == _loss(trained)
    assert abs(_loss(loaded) - untrained_loss) > 1e-3


def test_what_a_split_model_trained_is_an_adapter_of_the_unsplit_one(base, tmp_path):
    spec = ModelSpec(source=str(base), r=4)
    split = load(spec)
    whole = Segment("device", 0, split.n_blocks)
    split.install({n: torch.nn.Parameter(t) for n, t in _shaken(split.adapters(whole)).items()})
    expected = split.run(whole, {"input_ids": IDS, "labels": IDS}).loss.item()

    save_adapter(tmp_path, split.adapters(whole), lora_config(spec), str(base))

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    assert _loss(loaded) == pytest.approx(expected, abs=1e-6)


def test_transformers_loads_a_whole_model(base, tmp_path):
    trained = AutoModelForCausalLM.from_pretrained(base)
    weights = _shaken(dict(trained.named_parameters()))
    trained.load_state_dict(weights, strict=False)
    save_model(tmp_path, weights, trained.config)
    assert _loss(AutoModelForCausalLM.from_pretrained(tmp_path)) == _loss(trained)


def test_names_that_peft_would_only_warn_about_are_refused(tmp_path):
    names = {"layers.0.q_proj.lora_A.weight": torch.zeros(2, 2)}
    with pytest.raises(FedsplitError, match=r"starts with base_model\.model\."):
        save_adapter(tmp_path, names, LoraConfig(), "base")
    with pytest.raises(FedsplitError, match="at least one"):
        save_adapter(tmp_path, {}, LoraConfig(), "base")
