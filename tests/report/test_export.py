"""Exports: a plain PEFT or transformers script loads them and computes the same loss."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    LlamaConfig,
)

from fedsplit.assets import default_checkpoint
from fedsplit.errors import FedsplitError
from fedsplit.execution.aggregate import Part, aggregate
from fedsplit.growth import FEDEX
from fedsplit.models import ModelSpec, check_model, load
from fedsplit.models.lora import lora_config
from fedsplit.models.ranks import residual_rank
from fedsplit.models.tiny import tiny_config
from fedsplit.plan import Segment
from fedsplit.report import RoundRecord
from fedsplit.report.card import write_card
from fedsplit.report.export import save_adapter, save_model, save_trained

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
    split = load(ModelSpec(source=str(base), train="full"))
    whole = Segment("device", 0, split.n_blocks)
    weights = _shaken(split.adapters(whole))
    save_model(tmp_path, weights, split)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(weights) == set(dict(plain.named_parameters()))
    assert all(torch.equal(value, plain.get_parameter(n)) for n, value in weights.items())
    assert _loss(plain) == split.run(whole, {"input_ids": IDS, "labels": IDS}).loss.item()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_merged_model_computes_what_the_adapter_does(tmp_path, model_type):
    """GPT-2's layers hold their weights the other way round."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config(model_type, 2))
    plain.save_pretrained(tmp_path / "base")
    split = load(ModelSpec(source=str(tmp_path / "base"), r=4))
    initial = split.adapters(Segment("device", 0, split.n_blocks))
    values = _shaken(initial)
    ids = torch.arange(16).view(2, 8)
    save_trained(tmp_path / "adapter", values, split, initial)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    save_model(tmp_path / "merged", values, split)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(
        load_file(tmp_path / "base" / "model.safetensors")
    )
    with torch.no_grad():
        found, expected, before = (
            model(input_ids=ids).logits
            for model in (merged, adapted, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
        )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert (found - before).abs().max() > 1e-2


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_residuals_go_into_the_adapter_and_into_the_merged_model(base, tmp_path, lora):
    split = load(
        ModelSpec(source=str(base), r=4, target_modules=("q_proj", "down_proj"), lora=lora)
    )
    whole = Segment("device", 0, split.n_blocks)
    initial = split.adapters(whole)
    sets = [{n: k * t for n, t in _shaken(initial).items()} for k in (1.0, -2.0, 3.0)]
    values = aggregate(FEDEX, [Part(adapters=one, weight=1) for one in sets])
    assert residual_rank(values) == 8
    split.install(split.trainable(whole, values))
    expected = split.run(whole, {"input_ids": IDS, "labels": IDS}).loss.item()
    split.put(initial)
    without = split.run(whole, {"input_ids": IDS, "labels": IDS}).loss.item()
    save_trained(tmp_path / "adapter", values, split, initial)
    save_model(tmp_path / "merged", values, split)
    plain = AutoModelForCausalLM.from_pretrained(base)
    untrained = _loss(plain)
    assert without == pytest.approx(untrained, abs=1e-6)  # residuals of others are put away
    assert _loss(PeftModel.from_pretrained(plain, tmp_path / "adapter")) == pytest.approx(
        expected, abs=1e-5
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert _loss(merged) == pytest.approx(expected, abs=1e-5)
    assert abs(expected - untrained) > 1e-3


def test_a_merged_classifier_has_its_trained_head(tmp_path):
    sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 24, "num_attention_heads": 2}
    fields = sizes | {"num_hidden_layers": 2, "intermediate_size": 48, "num_labels": 3}
    task = {"task": "image-classification", "target_modules": "all-linear"}
    split = load(ModelSpec(model_type="vit", config=fields, r=2, **task))
    whole = Segment("device", 0, split.n_blocks)
    values = _shaken(split.adapters(whole))
    images = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}
    split.install({n: torch.nn.Parameter(t) for n, t in values.items()})
    expected = split.run(whole, images).loss.item()
    save_model(tmp_path, values, split)
    with torch.no_grad():
        loss = AutoModelForImageClassification.from_pretrained(tmp_path)(**images).loss.item()
    assert loss == pytest.approx(expected, abs=1e-5)


def test_a_card_says_what_was_trained_and_no_path_of_the_machine(tmp_path):
    config = {
        "model": {"source": "/home/me/secret/smollm2", "task": "causal-lm"},
        "fleet": {"devices": 3},
        "strategy": {"name": "sft", "cut": 2, "codec_table": "/home/me/secret/table.csv"},
        "data": {"source": "chat", "path": "/home/me/secret/notes"},
        "train": {
            "batch_size": 8,
            "steps": 4,
            "epochs": 1,
            "optimizer": {"name": "adamw", "lr": 1},
        },
        "seed": 7,
    }
    (tmp_path / "adapter_config.json").write_text("{}")
    write_card(tmp_path, config, [RoundRecord(0, eval_loss=4.0), RoundRecord(1, eval_loss=2.5)])
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    assert "smollm2" in text
    assert "secret" not in text
    assert "| scheme | name=sft, cut=2, codec_table=table.csv |" in text
    assert "| loss after | 2.5000 |" in text
    config["model"]["source"] = "HuggingFaceTB/SmolLM2-135M"
    write_card(tmp_path, config, [])
    assert ModelCard((tmp_path / "README.md").read_text()).data.base_model == (
        "HuggingFaceTB/SmolLM2-135M"
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_whole_model_keeps_what_its_checkpoint_said(tmp_path, use_cache):
    """The shipped model has a tokenizer, settings of generation and a tied head."""
    base = Path(shutil.copytree(default_checkpoint(), tmp_path / "base"))
    said = json.loads((base / "config.json").read_text()) | {"use_cache": use_cache}
    (base / "config.json").write_text(json.dumps(said))
    (base / "generation_config.json").write_text('{"max_new_tokens": 7, "eos_token_id": 3}')
    split = load(ModelSpec(source=str(base), train="full"))
    weights = _shaken(split.adapters(Segment("device", 0, split.n_blocks)))
    save_model(tmp_path / "model", weights, split)
    assert not split.model.config.use_cache

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert plain.config.use_cache is use_cache
    assert plain.config.architectures == ["LlamaForCausalLM"]
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(plain.lm_head.weight, weights["model.embed_tokens.weight"])
    assert (plain.generation_config.max_new_tokens, plain.generation_config.eos_token_id) == (7, 3)
    texts = ["Return the number.", "naïve café 東京"]
    ours, theirs = (AutoTokenizer.from_pretrained(f)(texts) for f in (tmp_path / "model", base))
    assert ours["input_ids"] == theirs["input_ids"]
    check_model(ModelSpec(source=str(tmp_path / "model")), seq_len=128)


@pytest.mark.parametrize("model_type", ["resnet", "vit"])
def test_a_whole_image_model_is_a_checkpoint_again(tmp_path, model_type):
    """With running statistics, where it has them."""
    sizes = {"image_size": 32, "patch_size": 16} if model_type == "vit" else {}
    config = sizes | {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    if model_type == "resnet":
        config = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    fields = config | {"num_labels": 3}
    task = {"task": "image-classification", "train": "full"}
    split = load(ModelSpec(model_type=model_type, config=fields, **task))
    whole = Segment("device", 0, split.n_blocks)
    weights = _shaken(split.adapters(whole))
    save_model(tmp_path, weights, split)
    images = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 2])}
    again = ModelSpec(source=str(tmp_path), **task)
    check_model(again)
    with torch.no_grad():
        expected = AutoModelForImageClassification.from_pretrained(tmp_path)(**images).loss
    assert load(again).run(whole, images).loss.item() == pytest.approx(expected.item())
    assert split.run(whole, images).loss.item() == pytest.approx(expected.item())


def test_experts_are_saved_as_their_checkpoints_have_them(tmp_path):
    """In memory they are one tensor; other programs look for each by its own name."""
    AutoModelForCausalLM.from_config(tiny_config("mixtral", 2)).save_pretrained(tmp_path / "base")
    split = load(ModelSpec(source=str(tmp_path / "base"), train="full"))
    save_model(tmp_path / "model", split.adapters(Segment("device", 0, 2)), split)
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "model")]
    assert set(stored[0]) == set(stored[1])
    assert all(torch.equal(value, stored[1][name]) for name, value in stored[0].items())


def test_names_that_peft_would_only_warn_about_are_refused(tmp_path):
    names = {"layers.0.q_proj.lora_A.weight": torch.zeros(2, 2)}
    with pytest.raises(FedsplitError, match=r"starts with base_model\.model\."):
        save_adapter(tmp_path, names, LoraConfig(), "base")
    with pytest.raises(FedsplitError, match="at least one"):
        save_adapter(tmp_path, {}, LoraConfig(), "base")
