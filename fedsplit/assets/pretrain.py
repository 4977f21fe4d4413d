"""Pretrain the shipped checkpoint on the docstrings of the running Python's standard library.

    python -m fedsplit.assets.pretrain --output DIR

Tokenizer, weights and order of the data depend on the seed and the Python version only (about
20 minutes on one core). None of the topics that the default job fine-tunes on is read.
"""

import argparse
import math
import time
from itertools import chain
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsplit.data.stdlib import docstrings
from fedsplit.seeds import derive_seed

END = "<|end|>"
VOCABULARY = 2048
CONTEXT = 256
BATCH = 8
PEAK_LR = 3e-3
WARMUP_STEPS = 100


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `VOCABULARY` tokens learnt from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=2 * CONTEXT,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Return the untrained model: 2.2 million parameters in 6 blocks."""
    torch.manual_seed(derive_seed(seed, "pretrain", "weights"))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=160,
            intermediate_size=448,
            num_hidden_layers=6,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=2 * CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def pretrain(model: LlamaForCausalLM, stream: torch.Tensor, epochs: int, seed: int) -> None:
    """Train all weights on `stream`, token ids of shape ``[n_tokens]``, by AdamW with cosine decay.

    Every epoch cuts the stream in windows at another offset and visits them in another order.
    """
    steps_per_epoch = (len(stream) - CONTEXT) // (CONTEXT * BATCH)
    n_steps = epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = LambdaLR(optimizer, lambda step: _warmup_then_cosine(step, n_steps))
    order = torch.Generator().manual_seed(derive_seed(seed, "pretrain", "order"))
    started = time.perf_counter()
    model.train()
    for epoch in range(epochs):
        offset = int(torch.randint(CONTEXT, (), generator=order))
        windows = stream[offset:].unfold(0, CONTEXT, CONTEXT)
        visits = torch.randperm(len(windows), generator=order)[: steps_per_epoch * BATCH]
        total = 0.0
        for chosen in visits.view(steps_per_epoch, BATCH):
            batch = windows[chosen]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
        elapsed = time.perf_counter() - started
        print(
            f"epoch {epoch + 1}/{epochs}  loss {total / steps_per_epoch:.3f}  {elapsed:.0f} s",
            flush=True,
        )


def _warmup_then_cosine(step: int, n_steps: int) -> float:
    """Return the learning rate at `step` as a share of its peak."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, n_steps - WARMUP_STEPS)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def main() -> None:
    """Read the options, pretrain, write the checkpoint folder."""
    parser = argparse.ArgumentParser(description="Pretrain the shipped checkpoint.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    texts = docstrings()
    tokenizer = train_tokenizer(texts)
    ids = chain.from_iterable(
        [*tokenizer(text, verbose=False).input_ids, tokenizer.eos_token_id] for text in texts
    )
    stream = torch.tensor(list(ids))
    model = build_model(options.seed)
    print(f"{len(texts)} modules, {len(stream)} tokens, {model.num_parameters()} parameters")
    pretrain(model, stream, options.epochs, options.seed)

    # Half precision keeps the file small; loaders compute in the config's float32.
    torch.nn.Module.to(model, torch.float16)
    model.save_pretrained(options.output)
    model.config.dtype = torch.float32
    model.config.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
