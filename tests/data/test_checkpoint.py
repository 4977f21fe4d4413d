"""The shipped checkpoint: found, small, really pretrained, and worth fine-tuning further."""

import importlib.util
import math
from importlib import metadata
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit import assets
from fedsplit.assets import default_checkpoint
from fedsplit.assets.pretrain import CONTEXT, build_model, pretrain, train_tokenizer
from fedsplit.data import DataSpec, batches, load_data, training_batches
from fedsplit.errors import FedsplitError
from fedsplit.seeds import generator


@pytest.fixture(scope="module")
def data():
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
    return load_data(DataSpec(), tokenizer, n_devices=4, seed=0)


def _test_loss(model, data) -> float:
    model.eval()
    total = count = 0
    with torch.no_grad():
        for device in range(data.n_devices):
            batch = next(batches(data.test(device), 8))
            total += model(**batch.inputs).loss.item() * len(batch.samples)
            count += len(batch.samples)
    return total / count


def test_it_is_small_enough_for_a_repository():
    assert sum(file.stat().st_size for file in default_checkpoint().iterdir()) < 8e6


def test_lora_lowers_its_loss_on_every_devices_topics_within_some_steps(data):
    model = AutoModelForCausalLM.from_pretrained(default_checkpoint())
    assert model.dtype == torch.float32
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    before = _test_loss(model, data)
    assert before < 0.6 * math.log(model.config.vocab_size)

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    steps = 5
    drawn = [
        training_batches(data.train(device), 8, generator(0, device), steps)
        for device in range(data.n_devices)
    ]
    for step in zip(*drawn, strict=True):
        for batch in step:
            model(**batch.inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert _test_loss(model, data) < 0.94 * before


def test_pretraining_twice_gives_the_same_tokenizer_and_weights():
    texts = [f"def function_{number}(): return {number} * 2" for number in range(400)]
    first, second = train_tokenizer(texts), train_tokenizer(texts)
    assert first.get_vocab() == second.get_vocab()
    stream = torch.tensor(first(" ".join(texts), verbose=False).input_ids)[: CONTEXT * 9]
    models = [build_model(seed=3) for _ in range(2)]
    untrained = build_model(seed=3).state_dict()
    for model in models:
        pretrain(model, stream, epochs=1, seed=3)
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[1].state_dict()[name])
        assert not torch.equal(weight, untrained[name])


def _module_in(folder: Path):
    """The module that finds the checkpoint, imported from another folder, without weights."""
    copied = folder / "_locate.py"
    copied.write_text((Path(assets.__file__).parent / "_locate.py").read_text())
    spec = importlib.util.spec_from_file_location("locate_elsewhere", copied)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_that_was_sent_without_weights_finds_the_installed_ones(tmp_path):
    try:
        metadata.distribution("fedsplit")
    except metadata.PackageNotFoundError:
        pytest.skip("fedsplit is not installed, only on the path")
    found = _module_in(tmp_path).default_checkpoint()
    assert tmp_path not in found.parents
    assert AutoTokenizer.from_pretrained(found).vocab_size == 2048


def test_no_checkpoint_anywhere_is_one_clear_error(tmp_path, monkeypatch):
    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", not_installed)
    with pytest.raises(FedsplitError, match=r"python -m fedsplit\.assets\.pretrain"):
        _module_in(tmp_path).default_checkpoint()
