"""A tokenizer of single bytes: what it gives can be checked by eye."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

END = "<|end|>"


BEGIN = "<|begin|>"


def _bytewise() -> Tokenizer:
    vocabulary = {END: 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    bytewise = Tokenizer(models.BPE(vocabulary, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return bytewise


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=_bytewise(), eos_token=END)


@pytest.fixture(scope="session")
def beginning_tokenizer() -> PreTrainedTokenizerFast:
    """One that puts a token before every text, as Llama's does."""
    bytewise = _bytewise()
    bytewise.add_special_tokens([BEGIN])
    bytewise.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, bytewise.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token=END, bos_token=BEGIN)
