"""What several parts of the suite share: a tiny language model with its tokenizer, and its data."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What earlier runs found out about models must not decide what the tests find.
os.environ["FEDSPLIT_CACHE"] = ""
torch.set_num_threads(1)

_TEXT = "the quick brown fox jumps over the lazy dog and runs away from every cat in town. " * 40


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a four-block Llama with a byte-level tokenizer, random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of four small text files, one for each of four devices."""
    folder = tmp_path_factory.mktemp("texts")
    for index, word in enumerate(("red", "green", "blue", "grey")):
        count = 12 + 4 * index
        lines = [f"{word} line {n}: {word} things are {n * n} times {word}." for n in range(count)]
        (folder / f"{word}.txt").write_text("\n\n".join(lines) + "\n")
    return folder
