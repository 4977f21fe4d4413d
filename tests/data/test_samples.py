"""Samples and batches: what the model is given, token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.data import batches, training_batches
from fedsplit.data.examples import Pair, Picture, Text, paragraphs
from fedsplit.data.samples import IGNORED, PictureSamples, TokenSamples, pack, pad
from fedsplit.errors import FedsplitError
from fedsplit.seeds import generator


def _numbered(n_samples: int) -> TokenSamples:
    """Samples whose only token is their own number."""
    return TokenSamples({"input_ids": torch.arange(n_samples)[:, None]})


@settings(max_examples=50, deadline=None)
@given(n_samples=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_an_epoch_visits_every_sample_once(n_samples, batch_size, seed):
    epoch = list(batches(_numbered(n_samples), batch_size, generator(seed)))
    visited = [sample for batch in epoch for sample in batch.samples]
    assert sorted(visited) == list(range(n_samples))
    for batch in epoch:
        assert batch.inputs["input_ids"].flatten().tolist() == list(batch.samples)


def test_without_a_generator_batches_come_in_order():
    assert [batch.samples for batch in batches(_numbered(5), 2)] == [(0, 1), (2, 3), (4,)]
    assert [batch.samples for batch in batches(_numbered(5), 2, drop_last=True)] == [(0, 1), (2, 3)]


@settings(max_examples=50, deadline=None)
@given(
    n_samples=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    steps=st.integers(0, 40),
    seed=st.integers(0, 2**40),
)
def test_training_batches_are_as_many_as_asked_for_and_of_one_size(
    n_samples, batch_size, steps, seed
):
    drawn = list(training_batches(_numbered(n_samples), batch_size, generator(seed), steps))
    assert len(drawn) == steps
    size = min(batch_size, n_samples)
    assert all(len(set(batch.samples)) == len(batch.samples) == size for batch in drawn)
    per_epoch = n_samples // size
    for start in range(0, steps - per_epoch + 1, per_epoch):
        epoch = [s for batch in drawn[start : start + per_epoch] for s in batch.samples]
        assert len(set(epoch)) == len(epoch) == per_epoch * size


def test_training_goes_through_the_samples_in_another_order_every_epoch():
    drawn = list(training_batches(_numbered(32), 32, generator(0), 3))
    assert len({batch.samples for batch in drawn}) == 3


def test_texts_are_packed_without_padding_and_unrelated_ones_are_separated(tokenizer):
    texts = [Text("abc\n\n", 0, ends=False), Text("de", 0), Text("", 0), Text("fghij", 0)]
    samples = pack(texts, tokenizer, 4)
    assert tokenizer.batch_decode(samples.tensors["input_ids"]) == [
        "abc\n",
        "\nde<|end|>",
        "fghi",
    ]
    assert set(samples.tensors) == {"input_ids", "labels"}
    torch.testing.assert_close(samples.tensors["labels"], samples.tensors["input_ids"])


def test_the_loss_of_a_pair_is_on_its_target_and_end_only(tokenizer):
    samples = pad([Pair("ab", "xyz", 0)], tokenizer, 9, all_tokens=False)
    ids, labels, mask = (samples.tensors[n][0] for n in ("input_ids", "labels", "attention_mask"))
    learnt = labels != IGNORED
    assert tokenizer.decode(ids[mask.bool()]) == "ab\nxyz<|end|>"
    assert tokenizer.decode(ids[learnt]) == "xyz<|end|>"
    torch.testing.assert_close(labels[learnt], ids[learnt])
    assert mask.tolist() == [1] * 7 + [0] * 2


def test_the_prompt_is_learnt_too_if_asked_for_but_padding_never(tokenizer):
    labels = pad([Pair("ab", "xyz", 0)], tokenizer, 9, all_tokens=True).tensors["labels"][0]
    assert (labels != IGNORED).tolist() == [True] * 7 + [False] * 2


def test_long_pairs_are_cut_and_pairs_without_room_for_a_target_left_out(tokenizer):
    samples = pad([Pair("a", "x" * 20, 0), Pair("b" * 20, "y", 0)], tokenizer, 6, all_tokens=False)
    assert tokenizer.batch_decode(samples.tensors["input_ids"]) == ["a\nxxxx"]
    with pytest.raises(FedsplitError, match=r"data\.seq_len=6: must be longer than the prompts"):
        pad([Pair("b" * 20, "y", 0)], tokenizer, 6, all_tokens=False)


def test_too_little_text_for_one_sample_is_refused(tokenizer):
    with pytest.raises(FedsplitError, match=r"data\.seq_len=10: must be at most 4"):
        pack([Text("abc", 0)], tokenizer, 10)


def test_pictures_are_resized_and_scaled():
    black_and_white = np.stack([np.zeros((2, 2)), np.full((2, 2), 255)]).astype(np.uint8)
    pictures = [
        Picture(np.repeat(image[None], 3, axis=0), i) for i, image in enumerate(black_and_white)
    ]
    inputs = PictureSamples(pictures, image_size=5).select((1, 0))
    assert inputs["labels"].tolist() == [1, 0]
    expected = torch.ones(2, 3, 5, 5)
    expected[1] = -1
    torch.testing.assert_close(inputs["pixel_values"], expected)


def test_paragraphs_keep_the_text_and_mark_where_the_document_ends():
    document = "one\ntwo\n\n\n\n    three\n\nfour\n"
    parts = paragraphs(document, 7)
    assert [part.text for part in parts] == ["one\ntwo\n\n", "    three\n\n", "four\n\n"]
    assert [part.ends for part in parts] == [False, False, True]


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(FedsplitError, match="batch_size=0"):
        next(batches(_numbered(3), 0))
