"""Batches that are only as long as their longest sample: the same loss and gradients."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit.assets import default_checkpoint
from fedsplit.data import DataSpec
from fedsplit.data.examples import Pair
from fedsplit.data.tokens import pad

PAIRS = [Pair(f"Return {'a list of ' * n}items", f"x = {n}, or None", 0) for n in (0, 1, 3, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradients_are_those_of_the_fixed_length(dtype):
    tokenizer = AutoTokenizer.from_pretrained(default_checkpoint())
    model = AutoModelForCausalLM.from_pretrained(default_checkpoint(), dtype=dtype)
    found = []
    for padding in ("fixed", "longest"):
        samples = pad(PAIRS, tokenizer, DataSpec(seq_len=128, padding=padding))
        inputs = samples.select([0, 1, 2, 3])
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((inputs["input_ids"].shape[1], loss.detach(), gradients))
    (fixed, loss, gradients), (longest, same_loss, same_gradients) = found
    assert longest < fixed / 2
    assert longest % 8 == 0
    close = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(same_loss, loss, rtol=close, atol=0)
    scale = gradients.abs().max().item()
    torch.testing.assert_close(same_gradients, gradients, rtol=0, atol=10 * close * scale)
